#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# guest.sh REGION: make an XFS with DAX on REGION, and deduplicate a file against space that was
# allocated but never written, in blocks of a deleted file.
. "$(dirname "$0")/../lib.sh"

blocks() {
	xfs_io -c fiemap "$1" | sed -n 's/.*\]: //p' | head -n 1
}

expected "FIDEDUPERANGE of unequal ranges changes nothing"
need mkfs.xfs xfs_io
namespace "$1" fsdax
page=$(getconf PAGESIZE)
mkfs.xfs -q -f -b size="$page" "/dev/$device" && mount -o dax=always "/dev/$device" /mnt ||
	unknown "no XFS with DAX"
cd /mnt || unknown "no /mnt"
yes 'promised data' | head -c "$page" > d
xfs_io -f -c "falloc 0 $((8 * page))" x
cat d d d d d d d d | dd of=x conv=notrunc bs="$page" 2> /dev/null
sync
old=$(blocks x)
rm x
sync
xfs_io -f -c "falloc 0 $((8 * page))" s
sync
[ "$(blocks s)" = "$old" ] || unknown "the new file does not have the blocks $old of the old one"
before=$(cksum < d)
text=$(xfs_io -c "dedupe s 0 0 $page" d 2>&1)
after=$(cksum < d)
cd / && umount /mnt
[ "$before" = "$after" ] || shown "the file has lost its data: $text"
gone "the file has its data: $text"
