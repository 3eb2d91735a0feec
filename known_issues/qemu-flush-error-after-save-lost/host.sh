#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# Save a machine while a flush is pending, let its fdatasync fail afterwards, and restore the machine.
. "$(dirname "$0")/../lib.sh"

save_while_pending() {
	await '^pending' out
	echo stop
	echo info status
	await '^VM status: paused' answers
	cp calls stopped
	echo 'migrate -d "exec:cat > state"'
	progress '^(Migration status|Status):[[:space:]]*completed'
	cp calls saved
	await EIO calls
	echo quit
}

expected "a flush whose fdatasync fails is reported to the guest as failed, also if it was migrated"
need strace
dimm 0
tracer='strace -f -qq -o calls -e trace=fdatasync -e inject=fdatasync:error=EIO:delay_enter=8s'
steps=save_while_pending
bare flush
saved
grep -q 'EIO.*INJECTED' calls || unknown "no fdatasync failed"
! grep -q H_SCM_FLUSH out || unknown "the flush ended before the machine was saved"
tracer=
steps=resume
bare flush -incoming 'exec:cat state'
if grep -q '^H_SCM_FLUSH = 0 ' out; then
	shown "fdatasync returned EIO on the source, and the guest's flush succeeded"
elif grep -q '^H_SCM_FLUSH = -1 ' out; then
	if ! grep -q EIO stopped && grep -q EIO saved; then
		unknown "fdatasync failed while the machine was saved: a slow host, or QEMU waited for it"
	fi
	gone "the guest's flush failed with H_HARDWARE"
fi
unknown "QEMU exits with status $status: $message"
