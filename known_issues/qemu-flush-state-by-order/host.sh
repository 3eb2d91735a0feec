#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# Save a machine while a flush is pending, and load it into one with its -device options exchanged.
. "$(dirname "$0")/../lib.sh"

save_while_pending() {
	await '^pending' out
	save
}

expected "H_SCM_FLUSH with the token of a pending flush returns H_SUCCESS (0) on the destination"
need strace
dimm 0 -- addr=0x40000000
dimm 1 -- addr=0x50000000
tracer='strace -f -qq -o calls -e trace=fdatasync -e inject=fdatasync:delay_enter=5s'
steps=save_while_pending
bare flush
saved
! grep -q '^H_SCM_FLUSH' out || unknown "the flush ended before the machine was saved"
steps=resume
dimms=
dimm 1 -- addr=0x50000000
dimm 0 -- addr=0x40000000
bare flush -incoming 'exec:cat state'
if grep -q '^H_SCM_FLUSH = -55 ' out; then
	shown "H_SCM_FLUSH returned H_P2 (-55): the token is unknown"
elif grep -q '^H_SCM_FLUSH = 0 ' out; then
	gone "H_SCM_FLUSH returned H_SUCCESS"
fi
unknown "QEMU exits with status $status: $message"
