#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# guest.sh REGION1 REGION2: disable namespaces in REGION1, which is synchronous, and enable one in
# REGION2, which is not. It is expected to reuse the memory of a dax_device of the former ones.
. "$(dirname "$0")/../lib.sh"

tries=30

expected "an fsdax namespace refuses MAP_SYNC if stores need a flush by the hypervisor"
asynchronous "$2"
namespace "$1" fsdax -s 128M
dax_file "/dev/$device"
map_sync /mnt/file 64k
umount /mnt
[ "$granted" = yes ] || unknown "$1 is not synchronous"
# The more of them, the less depends on the order in which a slab's free objects are used.
for number in $(seq 7); do
	ndctl create-namespace -r "$1" -m raw -s 16M > /dev/null || unknown "no namespace $number in $1"
done
namespace "$2" fsdax
dax_file "/dev/$device"
umount /mnt
# One CPU has one list of free objects.
taskset -p 1 $$ > /dev/null
for try in $(seq $tries); do
	ndctl disable-namespace -r "$2" all
	ndctl enable-namespace -r "$1" all
	ndctl disable-namespace -r "$1" all
	ndctl enable-namespace -r "$2" all
	mount -o dax=always "/dev/$device" /mnt || unknown "no mount in try $try"
	map_sync /mnt/file 64k
	umount /mnt
	[ "$granted" = no ] || shown "MAP_SYNC is granted on $2 in try $try, after $1 was disabled"
done 2> /dev/null
gone "MAP_SYNC is refused on $2 in $tries tries, each after $1 was disabled"
