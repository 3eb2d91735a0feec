#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# Save a machine while a flush is pending, and load it into one that has the DIMM in another slot.
. "$(dirname "$0")/../lib.sh"

save_while_pending() {
	await '^pending' out
	save
}

expected "the destination refuses the machine with a message, and exits with status 1"
need strace
dimm 0
tracer='strace -f -qq -o calls -e trace=fdatasync -e inject=fdatasync:delay_enter=5s'
steps=save_while_pending
bare flush
saved
! grep -q '^H_SCM_FLUSH' out || unknown "the flush ended before the machine was saved"
tracer=
steps=resume
dimms=
dimm 0 -- slot=1
bare flush -incoming 'exec:cat state'
case $status in
134 | 139) shown "the destination dies of signal $((status - 128)); its last message is: $message" ;;
1) ! grep -q 'load of migration failed' err || gone "$(head -n 1 err)" ;;
esac
unknown "QEMU exits with status $status: $message"
