#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# CPU time for the start of machines with maxmem=256G and maxmem=1T.
. "$(dirname "$0")/../lib.sh"

# children_ms: set $total to the CPU time of this shell's children so far, ms.
children_ms() {
	times > cpu
	total=$(tail -n 1 cpu | tr ms '  ' | awk '{ print int(($1 * 60 + $2 + $3 * 60 + $4) * 1000) }')
}

# cpu_ms MAXMEM: set $ms to the CPU time of a machine that is only created.
cpu_ms() {
	children_ms
	before=$total
	accepts -m "512M,slots=1,maxmem=$1" || unknown "QEMU exits with status $status: $message"
	children_ms
	ms=$((total - before))
}

expected "four times as much maxmem takes about four times as long"
cpu_ms 1G
base=$ms
cpu_ms 256G
one=$((ms - base))
cpu_ms 1T
two=$((ms - base))
found="$one ms of CPU time for maxmem=256G, $two ms for 1T"
if [ "$two" -gt $((one * 6)) ]; then
	shown "$found"
elif [ "$two" -lt $((one * 5)) ]; then
	gone "$found"
fi
unknown "$found"
