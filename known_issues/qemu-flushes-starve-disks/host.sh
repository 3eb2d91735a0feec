#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# A request of a disk, while 60 and then 64 flushes of a DIMM hang for 3 s.
. "$(dirname "$0")/../lib.sh"

request() {
	await '^begun' out
	echo 'qemu-io disk "read 0 512"'
}

# request_with NUMBER: run a request while so many flushes hang, and set $time.
request_with() {
	steps=request
	bare "hang$1" -drive if=none,id=disk,file=disk,format=raw,aio=threads
	time=$(sed -n 's/.* 1 ops; \([0-9:.]*\).*/\1/p' answers | head -n 1)
	[ -n "$time" ] || unknown "the disk did not answer; QEMU's status is $status: $message"
}

expected "a request of a disk is answered at once while a DIMM's flushes hang"
need strace
dimm 0
truncate -s 1M disk
tracer='strace -f -qq -o calls -e trace=fdatasync -e inject=fdatasync:delay_enter=3s'
request_with 60
case $time in
00.*) ;;
*) unknown "the disk answers after $time even while 60 flushes hang" ;;
esac
request_with 64
case $time in
00.*) gone "the disk answers after $time while 64 flushes hang" ;;
esac
shown "the disk answers after $time while 64 flushes hang"
