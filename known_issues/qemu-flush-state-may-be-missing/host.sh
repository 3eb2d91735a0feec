#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# Save a machine with a plain nvdimm, and load it into one with a spapr-nvdimm.
. "$(dirname "$0")/../lib.sh"

load() {
	loaded
	echo quit
}

expected "the destination refuses a stream that lacks the section spapr_nvdimm_states"
device=nvdimm
dimm 0
steps=save
run -S
saved
! grep -aq spapr_nvdimm_states state || unknown "the stream has the section"
device=spapr-nvdimm
dimms=
dimm 0
steps=load
run -S -incoming 'exec:cat state'
if [ "$status" -eq 0 ] && grep '^VM status' answers | tail -n 1 | grep -qv inmigrate; then
	shown "the destination accepts the machine"
elif [ "$status" -eq 1 ] && grep -q 'load of migration failed' err; then
	gone "$(head -n 1 err)"
fi
unknown "QEMU exits with status $status: $message"
