#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# guest.sh REGION: write to a disk, call sync(2), and count the flushes of REGION.
. "$(dirname "$0")/../lib.sh"

tracing=/sys/kernel/tracing

# The number of flushes so far.
flushes() {
	awk '$1 == "reproduce" { print $2 }' "$tracing/kprobe_profile"
}

expected "sync(2) flushes the disk that was written to, like fsync(2)"
asynchronous "$1"
namespace "$1" fsdax
[ -e "$tracing/kprobe_events" ] || mount -t tracefs tracefs "$tracing"
echo "p:kprobes/reproduce nvdimm_flush" >> "$tracing/kprobe_events" &&
	echo 1 > "$tracing/events/kprobes/reproduce/enable" || unknown "no kprobe on nvdimm_flush"

# The disk stays open, so that the data are in the page cache until sync(2).
exec 3<> "/dev/$device"
before=$(flushes)
dd if=/dev/zero of="/dev/$device" bs=4096 count=1 conv=notrunc,fsync 2> /dev/null
after=$(flushes)
[ "$after" -gt "$before" ] || unknown "fsync(2) does not flush $1"
dd if=/dev/zero of="/dev/$device" bs=4096 count=1 conv=notrunc 2> /dev/null
sync
[ "$(flushes)" -eq "$after" ] || gone "sync(2) flushes $1"
shown "fsync(2) flushes $1 $((after - before)) times, sync(2) never"
