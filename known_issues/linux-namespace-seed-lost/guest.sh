#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# guest.sh REGION: fill half of REGION with small namespaces, bind its driver again and again, and
# look whether an empty namespace is left for the next `ndctl create-namespace`.
. "$(dirname "$0")/../lib.sh"

tries=80

expected "after its driver was bound, a region with free space has an empty namespace as its seed"
need ndctl
ndctl disable-region "$1" && ndctl zero-labels "$(sed 's/,.*//' "/sys/bus/nd/devices/$1/mapping0")" &&
	ndctl enable-region "$1" || unknown "$1 has no labels"
half=$(($(cat "/sys/bus/nd/devices/$1/size") / 2))
while [ "$(cat "/sys/bus/nd/devices/$1/available_size")" -gt "$half" ]; do
	ndctl create-namespace -r "$1" -m raw -s 16M > /dev/null || unknown "no namespace in $1"
done 2> /dev/null
for try in $(seq $tries); do
	ndctl disable-region "$1" && ndctl enable-region "$1"
	# Wait for all probes.
	cat /sys/bus/nd/devices/ndbus*/wait_probe
	seed=$(cat "/sys/bus/nd/devices/$1/namespace_seed")
	size=$(cat "/sys/bus/nd/devices/$seed/size")
	[ "$size" = 0 ] || break
done > /dev/null 2>&1
[ "$size" = 0 ] || shown "at try $try, the seed of $1 is $seed, which has $size bytes"
gone "the seed of $1 is empty after each of $tries tries"
