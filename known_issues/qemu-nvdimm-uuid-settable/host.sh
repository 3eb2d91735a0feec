#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# Change the uuid of a DIMM in a machine that has started.
. "$(dirname "$0")/../lib.sh"

set_uuid() {
	echo 'qom-set /machine/peripheral/nv0 uuid 22222222-0000-0000-0000-000000000000'
	echo 'qom-get /machine/peripheral/nv0 uuid'
	echo quit
}

expected "QEMU refuses the change, as it does for all other properties of the DIMM"
dimm 0
steps=set_uuid
run -S
if grep -q '^"22222222-' answers; then
	shown "the uuid is $(grep '^"22222222-' answers)"
elif grep -q '^Error:' answers && grep -q '^"11111111-' answers; then
	gone "$(grep '^Error:' answers)"
fi
unknown "QEMU exits with status $status: $message"
