#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# Flushes that begin at the same time, one more than there are idle workers.
. "$(dirname "$0")/../lib.sh"

expected "all of them run at the same time"
need strace
dimm 0
# Without --seccomp-bpf, strace stops QEMU at each system call, and the workers have time to wake up.
tracer='strace -f --seccomp-bpf -qq -o calls -e trace=fdatasync
	-e inject=fdatasync:delay_enter=1s'
late=0
for _ in 1 2 3 4 5 6; do
	bare rounds
	count=$(sed -n '$s/^late: //p' out)
	[ -n "$count" ] || unknown "QEMU exits with status $status: $message"
	[ "$count" -lt 2 ] || shown "in $count of 8 rounds, one flush waited for another"
	late=$((late + count))
done
[ $late = 0 ] || unknown "in $late of 48 rounds, one flush was late: the bug, or a busy host"
gone "in each of 48 rounds, all flushes ran at the same time"
