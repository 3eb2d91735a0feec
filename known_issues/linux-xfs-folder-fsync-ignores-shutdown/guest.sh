#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# guest.sh REGION|DISK: let a log write of XFS fail, and call fsync() of a folder that is open.
. "$(dirname "$0")/../lib.sh"

expected "fsync() of a folder fails if the log was shut down before its new entry was written"
need cc mkfs.xfs mkfifo
cc -Wall -o held held.c || unknown "held.c does not compile"
breakable "$1"
mkfs.xfs -q -f "$disk" && mount "$disk" /mnt && mkdir /mnt/folder && sync -f /mnt || unknown "no XFS"
# XFS refuses to open a file after a shutdown, so the folder is opened now.
mkfifo go
./held /mnt/folder < go > result &
exec 3> go
touch /mnt/folder/entry /mnt/file
table error
text=$(sync /mnt/file 2>&1) && unknown "fsync() succeeds on a broken disk"
table linear
exec 3>&-
wait $!
status=$?
text=$(cat result)
umount /mnt && mount "$disk" /mnt || unknown "no second mount"
[ -e /mnt/folder/entry ] && kept=yes || kept=no
umount /mnt
case $status,$kept in
1,*) gone "of the folder after the shutdown, $text" ;;
0,no) shown "of the folder after the shutdown, $text, and its entry is lost after a remount" ;;
*) unknown "$text, entry kept: $kept" ;;
esac
