#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# guest.sh REGION: make an XFS with DAX on REGION, and deduplicate a file against space that was
# allocated but never written, in blocks of a deleted file.
. "$(dirname "$0")/../lib.sh"

expected "FIDEDUPERANGE of unequal ranges changes nothing"
namespace "$1" fsdax
xfs_with_dax "/dev/$device"
xfs_io -f -c "pwrite -q -S 0x5a 0 $page" d
before=$(cksum < d)
# The disk is full then; when the file is removed, most free blocks have its data.
xfs_io -f -c "pwrite -q -S 0x5a -b 4m 0 1t" x 2> /dev/null
sync
rm x
sync
xfs_io -f -c "falloc 0 256m" s
sync
for at in $(seq 0 8388608 268369920); do
	# Place in the file and on the disk, in sectors.
	extent=$(xfs_io -c "fiemap $at $page" s |
		sed -n 's/.*\[\([0-9]*\)\.\..*\]: \([0-9]*\)\.\..*/\1 \2/p')
	sector=$((${extent#* } + at / 512 - ${extent% *}))
	stale=$(dd if="/dev/$device" bs=512 skip=$sector count=$((page / 512)) iflag=direct \
		2> /dev/null | cksum)
	[ "$stale" != "$before" ] || break
done
[ "$stale" = "$before" ] || unknown "the blocks of the new file do not have old data"
text=$(xfs_io -c "dedupe s $at 0 $page" d 2>&1)
after=$(cksum < d)
cd / && umount /mnt
[ "$before" = "$after" ] || shown "the file has lost its data: $text"
gone "the file has its data: $text"
