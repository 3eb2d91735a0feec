#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# guest.sh REGION|DISK: call fsync(), chmod() and fsync() of one file while the disk is suspended, so
# that the second fsync() waits for the inode lock, and then break the disk.
. "$(dirname "$0")/../lib.sh"

# blocked PID: wait until a process sleeps in the kernel.
blocked() {
	for _ in $(seq 50); do
		[ "$(sed 's/.*) //; s/ .*//' "/proc/$1/stat")" = D ] && return
		sleep 0.1
	done
	unknown "process $1 does not wait for the disk"
}

expected "fsync() fails if the log is shut down while it waits for the inode lock"
need mkfs.xfs
breakable "$1"
mkfs.xfs -q -f "$disk" && mount -o noatime "$disk" /mnt && sync -f /mnt || unknown "no XFS"
dd if=/dev/urandom of=/mnt/file bs=64k count=1 oflag=direct 2> /dev/null || unknown "no write"
sum=$(cksum < /mnt/file)
dmsetup load reproduce --table "0 $sectors error" &&
	dmsetup suspend --noflush --nolockfs reproduce || unknown "the disk is not suspended"
sync /mnt/file 2> /dev/null &
first=$!
blocked $first
# From 6.18 on, no fsync() holds the lock, so this returns at once.
chmod 600 /mnt/file 2> /dev/null &
sleep 1
sync /mnt/file 2> error &
second=$!
blocked $second
dmsetup resume reproduce
wait $first && unknown "the first fsync() succeeds on a broken disk"
wait $second
status=$?
wait
table linear
umount /mnt && mount "$disk" /mnt || unknown "no second mount"
[ "$(cat /mnt/file 2> /dev/null | cksum)" = "$sum" ] && kept=yes || kept=no
umount /mnt
[ $status -eq 0 ] || gone "the second fsync() fails: $(cat error)"
[ "$kept" = no ] || unknown "the second fsync() returns 0, and the file is complete after a remount"
shown "the first fsync() fails, the second returns 0, and the file is lost after a remount"
