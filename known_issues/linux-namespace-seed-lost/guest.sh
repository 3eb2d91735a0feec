#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# guest.sh REGION: fill REGION, which may be of any machine with labels, with namespaces of 16 MiB,
# and bind its driver again, up to 50 times.
. "$(dirname "$0")/../lib.sh"

expected "after each probe of a region its seed is an empty namespace"
need ndctl
bus=/sys/bus/nd
ndctl destroy-namespace -f -r "$1" all > /dev/null 2>&1
# Many of them lengthen the loop in the kernel that ends with setting the seed.
for _ in $(seq 14); do
	ndctl create-namespace -r "$1" -m raw -s 16M > /dev/null || unknown "ndctl made no namespace in $1"
done
for round in $(seq 50); do
	echo "$1" > "$bus/drivers/nd_region/unbind" && echo "$1" > "$bus/drivers/nd_region/bind" ||
		unknown "the driver of $1 was not bound again"
	cat "$bus"/devices/ndbus*/wait_probe > /dev/null
	seed=$(cat "$bus/devices/$1/namespace_seed")
	size=$(cat "$bus/devices/$seed/size") || unknown "the seed of $1 is '$seed'"
	[ "$size" = 0 ] || shown "after bind $round the seed is $seed, which has $size bytes and is in use"
done
gone "the seed was empty after each of 50 binds"
