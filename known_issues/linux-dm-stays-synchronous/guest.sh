#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# guest.sh REGION1 REGION2: extend a dm-linear on REGION1, which is synchronous, onto REGION2, which
# is not.
. "$(dirname "$0")/../lib.sh"

linear() {
	echo "0 65536 linear $1 $3"
	[ -z "$2" ] || echo "65536 65536 linear $2 $3"
}

expected "a dm-linear with a part that needs a flush by the hypervisor refuses MAP_SYNC"
need dmsetup
asynchronous "$2"
namespace "$1" fsdax
synchronous=/dev/$device
namespace "$2" fsdax
other=/dev/$device

# $granted of a new device of both parts, of one part, and of that device with both parts.
linear "$synchronous" "$other" 65536 | dmsetup create both || unknown "no dm device"
dax_file "/dev/$(dmsetup info -c --noheadings -o blkdevname both)"
map_sync /mnt/file 64k
umount /mnt
[ "$granted" = no ] || unknown "a new dm device of both regions grants MAP_SYNC, which it may have inherited: restart the machine"
linear "$synchronous" "" 0 | dmsetup create grows || unknown "no dm device"
dax_file "/dev/$(dmsetup info -c --noheadings -o blkdevname grows)"
map_sync /mnt/file 64k
[ "$granted" = yes ] || unknown "$1 is not synchronous"
linear "$synchronous" "$other" 0 | dmsetup reload grows && dmsetup suspend grows && dmsetup resume grows ||
	unknown "the dm device does not grow"
map_sync /mnt/file 64k
umount /mnt
[ "$granted" = no ] || shown "MAP_SYNC is granted after the dm device was extended onto $2"
gone "MAP_SYNC is refused after the dm device was extended onto $2"
