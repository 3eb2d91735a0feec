#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# Reset a machine while a flush hangs for 8 s, and ask the monitor something.
. "$(dirname "$0")/../lib.sh"

reset() {
	await '^begun' out
	echo info version
	# The monitor's answer begins with a digit.
	await '^[0-9]+\.[0-9]+' answers
	echo system_reset
	sleep 1
	echo info status
	await '^VM status' answers
	cp calls calls.then
	echo quit
}

expected "the monitor answers after a reset, while a flush hangs"
need strace
dimm 0
tracer='strace -f -qq -o calls -e trace=fdatasync -e inject=fdatasync:delay_enter=8s'
steps=reset
bare hang -action reboot=reset
[ -e calls.then ] || unknown "the monitor did not answer; QEMU's status is $status: $message"
grep -q fdatasync calls || unknown "there was no flush"
if grep -Eq 'fdatasync.*= 0' calls.then; then
	shown "the monitor answered only when the flush had ended"
fi
gone "the monitor answered while the flush was hanging"
