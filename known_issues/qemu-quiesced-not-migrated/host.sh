#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# Save a machine whose second CPU waits for its decrementer, and look for its interrupt after the restore.
. "$(dirname "$0")/../lib.sh"

save_when_ready() {
	await '^ready' out
	save
}

expected "the decrementer interrupt wakes the second CPU in the restored machine"
steps=save_when_ready
bare second -smp 2
saved
! grep -q '^interrupt' out || unknown "the interrupt arrived before the machine was saved"
steps=resume
bare second -smp 2 -incoming 'exec:cat state'
case $(tail -n 1 out) in
"interrupts: 1, 0") shown "an interrupt of the first CPU, none of the second within 8 s; both were due within 3 s" ;;
"interrupts: 1, 1") gone "both interrupts have arrived" ;;
"interrupts: 0, 0") unknown "no interrupt of any CPU: see qemu-decr-not-migrated" ;;
esac
unknown "QEMU exits with status $status: $message"
