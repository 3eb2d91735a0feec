#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# guest.sh REGION: fill the label area of REGION with namespaces of 64 KiB, and request one more.
. "$(dirname "$0")/../lib.sh"

expected "without a free slot for its label, a namespace is refused and does not exist"
need ndctl
devices=/sys/bus/nd/devices
ndctl destroy-namespace -f -r "$1" all > /dev/null 2>&1
read -r mapping < "$devices/$1/mapping0" && dimm=${mapping%%,*} || unknown "$1 has no DIMM"
size=65536
echo $size > "$devices/$1/align" || unknown "$1 does not accept an alignment of $size bytes"

# Request a namespace; $seed is its name.
request() {
	# Devices are added asynchronously.
	cat "$devices"/ndbus*/wait_probe > /dev/null
	read -r seed < "$devices/$1/namespace_seed" && read -r uuid < /proc/sys/kernel/random/uuid &&
		echo "$uuid" > "$devices/$seed/uuid" || unknown "$1 has no empty namespace"
	echo $size 2> /dev/null > "$devices/$seed/size"
}

while read -r slots < "$devices/$dimm/available_slots" && [ "$slots" -gt 0 ]; do
	request "$1" || unknown "$seed is refused although $slots slots are available"
	# Only then the region has a new empty namespace.
	echo "$seed" > /sys/bus/nd/drivers/nd_pmem/bind || unknown "$seed has no driver"
done
! request "$1" || unknown "$seed is accepted although no slot is available"
read -r left < "$devices/$seed/size"
[ "$left" != 0 ] || gone "$seed is refused and has no size"
read -r slots < "$devices/$dimm/available_slots"
shown "$seed is refused and has $left bytes; $(dmesg | sed -n 's/.*\(we ate our last.*\)/\1/p' | tail -n 1)"
