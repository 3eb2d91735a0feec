#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# Migrate a machine with two DIMMs to one with the same -device options in another order.
. "$(dirname "$0")/../lib.sh"

save_when_ready() {
	await '^ready' out
	save
}

expected "the guest finds its DIMMs where they were, or the destination refuses the machine"
dimm 0
dimm 1
steps=save_when_ready
bare swapped
saved
! grep -q '^DIMM' out || unknown "the program ended before the machine was saved"
steps=resume
dimms=
dimm 1
dimm 0
bare swapped -incoming 'exec:cat state'
if grep -q '^DIMM 0 has 0x2222, DIMM 1 has 0x1111$' out; then
	shown "the guest reads and writes DIMM 1's file at DIMM 0's address"
elif grep -q '^DIMM 0 has 0x1111, DIMM 1 has 0x2222$' out; then
	gone "each DIMM is at its address"
elif [ "$status" -eq 1 ] && grep -q 'load of migration failed' err; then
	gone "the destination refuses the machine: $(head -n 1 err)"
fi
unknown "QEMU exits with status $status: $message"
