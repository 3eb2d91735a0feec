#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# guest.sh REGION: enable an fsdax namespace with map=dev while its region is read-only, and compare
# the place of its page structures, which is in front of the data.
. "$(dirname "$0")/../lib.sh"

# raw 0|1: enable the namespace, as a raw disk with 1.
raw() {
	ndctl disable-namespace "$name" && echo "$1" > "$nd/$name/force_raw" && ndctl enable-namespace "$name" ||
		unknown "$name is not enabled with force_raw=$1"
} > /dev/null 2>&1

# sum: set $sum to the checksum of the place of the page structures.
sum() {
	sum=$(dd if="/dev/$device" bs=4k skip=2 count=$((size / 4096)) iflag=direct 2> /dev/null | cksum)
	[ "${sum#* }" = "$size" ] || unknown "$size bytes of /dev/$device cannot be read"
}

expected "enabling a namespace does not write to a read-only region"
namespace "$1" fsdax -M dev
nd=/sys/bus/nd/devices
pfn=$(basename "$(readlink -f "/sys/block/$device/device")")
name=$(cat "$nd/$pfn/namespace")
data=$(($(cat "$nd/$pfn/resource") - $(cat "$nd/$1/resource")))
raw 1
size=$((data - 8192))
# Bytes that no page structure has. The info block is at 4 KiB.
tr '\0' '\245' < /dev/zero | dd of="/dev/$device" bs=4k seek=2 count=$((size / 4096)) iflag=fullblock conv=fsync 2> /dev/null ||
	unknown "no write to the raw disk"
sum
before=$sum
echo 1 > "$nd/$1/read_only"
raw 0
[ "$(cat "/sys/block/$device/ro")" = 1 ] || unknown "the disk is not read-only"
raw 1
sum
[ "$before" = "$sum" ] || shown "the kernel has written to the $data bytes in front of the data"
gone "the $data bytes in front of the data do not change"
