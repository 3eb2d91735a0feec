#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# guest.sh REGION: make an XFS with DAX on REGION and a file with 2 MiB that can be mapped by one
# entry, clone the file, read a page of the first file, and then the 2 MiB of the second one.
. "$(dirname "$0")/../lib.sh"

expected "a mapping of a cloned file can be read"
namespace "$1" fsdax
huge=2097152
xfs_with_dax "/dev/$device"
# Where the last extent of file a begins on the disk, within 2 MiB.
place() {
	sync
	sector=$(xfs_io -c fiemap a | sed -n '$s/.*: \([0-9]*\)\.\.[0-9]*$/\1/p')
	echo $((sector * 512 % huge))
}
xfs_io -f -c "pwrite -q -b 8m 0 8m" a
begin=$(place)
rm a
sync
# Place in the file and place on the disk are congruent modulo 2 MiB.
xfs_io -f -c "pwrite -q -b 8m $begin 8m" a
[ "$(place)" = "$begin" ] || unknown "the file has other blocks"
cp --reflink=always a b || unknown "no reflink"
xfs_io -c "mmap -r $huge $page" -c "mread $huge 1" a || unknown "file a cannot be read"
xfs_io -c "mmap -r $huge $huge" -c "mread $huge 1" b
status=$?
cd / && umount /mnt
[ $status -ge 128 ] && shown "the process was killed by signal $((status - 128))"
[ $status = 0 ] || unknown "xfs_io failed"
gone "the mapping was read"
