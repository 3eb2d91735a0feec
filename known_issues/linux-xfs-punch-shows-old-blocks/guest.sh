#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# guest.sh REGION: make an XFS with DAX on REGION whose free blocks have the data of a deleted file,
# and punch a hole into a cloned file after a mapped store.
. "$(dirname "$0")/../lib.sh"

expected "a hole reads as zeros"
namespace "$1" fsdax
huge=2097152
xfs_with_dax "/dev/$device"
xfs_io -f -c "pwrite -q -S 0x5a -b 4m 0 1t" x 2> /dev/null
sync
rm x
sync
xfs_io -f -c "pwrite -q -S 1 -b $huge 0 $huge" a
cp --reflink=always a b || unknown "no reflink"
# Block 1 of b gets a copy, and blocks are reserved for copies of 0 and of 2 to 31.
xfs_io -c "pwrite -q -S 2 $page $page" b
xfs_io -c "reflink a" b > /dev/null
# The fault asks for 2 MiB, gets block 0 of the reservation, and is served by a small page.
xfs_io -c "mmap -rw 0 $huge" -c "mwrite -S 7 0 1" b
xfs_io -c "fpunch $((4 * page)) $((8 * page))" b
found=$(dd if=b bs="$page" skip=4 count=1 2> /dev/null | od -A n -t x1 -N 8)
rest=$(dd if=b bs="$page" skip=4 count=8 2> /dev/null | tr -d '\0' | wc -c)
cd / && umount /mnt
[ "$rest" = 0 ] || shown "the hole begins with$found, $rest bytes are not zero"
gone "the hole has zeros"
