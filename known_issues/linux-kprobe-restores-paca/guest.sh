#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# guest.sh: set a return probe, and move a process that hits it from CPU to CPU.
. "$(dirname "$0")/../lib.sh"

moves=1000

expected "a process that is moved to another CPU inside a probe keeps running"
need taskset
case $(uname -m),$(uname -v) in
ppc64*,*PREEMPT*) ;;
*) unknown "the kernel is not one for 64-bit POWER with kernel preemption: $(uname -mv)" ;;
esac
[ -d /sys/devices/system/cpu/cpu1 ] || unknown "there is one CPU"
cd /sys/kernel/tracing 2> /dev/null && { [ -d events ] || mount -t tracefs tracefs . && cd . ; } || unknown "no tracefs"
echo 'r:moved/read read_zero' > kprobe_events && echo 1 > events/moved/read/enable || unknown "no kprobe"
sleep 1
dd if=/dev/zero of=/dev/null bs=1 2> /dev/null &
reader=$!
for move in $(seq $moves); do
	taskset -p $((move % 2 + 1)) $reader > /dev/null 2>&1
	text=$(dmesg | grep -m 1 -E 'BUG: |rethook: |kernel BUG|Oops')
	[ -z "$text" ] || shown "after $move moves, ${text#*] }"
done
kill $reader 2> /dev/null || unknown "the process has ended"
gone "$moves moves, and no kernel message"
