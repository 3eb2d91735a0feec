#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# guest.sh REGION|DISK: let a commit of ext4's journal fail, repair the disk, and call fsync().
. "$(dirname "$0")/../lib.sh"

expected "fsync() fails if the journal was aborted before the file's transaction was committed"
breakable "$1"
mkfs.ext4 -q -F -E lazy_itable_init=0,lazy_journal_init=0 "$disk" > /dev/null 2>&1 &&
	mount -o noatime,commit=300,no_prefetch_block_bitmaps "$disk" /mnt && sync -f /mnt || unknown "no ext4"
# Direct I/O: writing back dirty pages would start a transaction, which detects the abort.
for file in first second; do
	dd if=/dev/urandom of=/mnt/$file bs=64k count=1 oflag=direct 2> /dev/null || unknown "no write"
done
sum=$(cksum < /mnt/second)
table error
text=$(sync /mnt/first 2>&1) && unknown "fsync() succeeds on a broken disk"
table linear
text=$(sync /mnt/second 2>&1)
status=$?
umount /mnt && mount "$disk" /mnt || unknown "no second mount"
[ "$(cat /mnt/second 2> /dev/null | cksum)" = "$sum" ] && kept=yes || kept=no
umount /mnt
[ $status -eq 0 ] || gone "fsync() fails: $text"
[ "$kept" = no ] || unknown "fsync() returns 0, and the file is complete after a remount"
shown "fsync() returns 0, and the file is lost after a remount"
