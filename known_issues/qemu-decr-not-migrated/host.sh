#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# Save a machine whose decrementer is going to expire, and look for its interrupt after the restore.
. "$(dirname "$0")/../lib.sh"

save_when_ready() {
	await '^ready' out
	save
}

expected "the decrementer interrupt arrives in the restored machine"
steps=save_when_ready
bare timer
saved
! grep -q '^interrupt' out || unknown "the interrupt arrived before the machine was saved"
steps=resume
bare timer -incoming 'exec:cat state'
case $(tail -n 1 out) in
"no interrupt") shown "no interrupt within 8 s; it was due within 3 s" ;;
interrupt) gone "the interrupt has arrived" ;;
esac
unknown "QEMU exits with status $status: $message"
