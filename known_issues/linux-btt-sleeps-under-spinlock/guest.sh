#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# guest.sh REGION: write one block of a sector namespace in REGION, which is asynchronous, from two
# threads. This script runs on CPU 0; CPU 1 may hang.
. "$(dirname "$0")/../lib.sh"

# look: end if the kernel has reported the bug.
look() {
	text=$(dmesg | grep -m 1 -E 'BUG: (scheduling while atomic|sleeping function|soft lockup - CPU#1)')
	[ -z "$text" ] || ! dmesg | grep -qE 'btt_(write_pg|submit_bio)' || shown "in the BTT's write path, ${text#*] }"
}

expected "a write to a sector namespace does not sleep while it holds a spinlock"
need cc taskset
cc -Wall -pthread -o same_block same_block.c || unknown "same_block.c does not compile"
asynchronous "$1"
[ -d /sys/devices/system/cpu/cpu1 ] || unknown "there is one CPU"
taskset -p 1 $$ > /dev/null
echo 2 > /proc/sys/kernel/watchdog_thresh || unknown "the kernel does not report a CPU that hangs"
namespace "$1" sector
# A kernel that counts preemption reports the first write.
text=$(dd if=/dev/zero of="/dev/$device" bs=4k count=1 oflag=direct 2>&1)
status=$?
look
[ $status -eq 0 ] || unknown "no write: $text"
./same_block "/dev/$device" 20 > result &
for _ in $(seq 60); do
	sleep 1
	look
	[ ! -s result ] || gone "$(cat result), and no kernel message"
done
unknown "the writers do not end, but the kernel reports nothing"
