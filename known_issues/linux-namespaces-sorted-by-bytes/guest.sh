#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# guest.sh REGION: make namespaces at 0, 2 and 16 MiB of REGION, and bind its driver again.
. "$(dirname "$0")/../lib.sh"

expected "namespaces are numbered in the order of their addresses"
need ndctl
bus=/sys/bus/nd
ndctl destroy-namespace -f -r "$1" all > /dev/null 2>&1
echo $((2 << 20)) > "$bus/devices/$1/align" || unknown "$1 does not accept an alignment of 2 MiB"
for size in 2M 14M 2M; do
	ndctl create-namespace -r "$1" -m raw -s $size > /dev/null || unknown "ndctl made no namespace in $1"
done
echo "$1" > "$bus/drivers/nd_region/unbind" && echo "$1" > "$bus/drivers/nd_region/bind" ||
	unknown "the driver of $1 was not bound again"
cat "$bus"/devices/ndbus*/wait_probe > /dev/null
number=${1#region}
places=
for name in 0 1 2; do
	read -r place < "$bus/devices/namespace$number.$name/resource" ||
		unknown "namespace$number.$name has no address"
	[ -z "$places" ] || [ $((place)) -gt $((last)) ] ||
		shown "the addresses of the namespaces are $places $place"
	places="$places${places:+ }$place" last=$place
done
gone "the addresses of the namespaces are $places"
