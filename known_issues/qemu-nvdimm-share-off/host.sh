#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# A DIMM with a private mapping of its file: H_SCM_FLUSH succeeds, and the file stays empty.
. "$(dirname "$0")/../lib.sh"

expected "QEMU refuses an NVDIMM whose stores do not reach its file"
dimm 0
accepts || unknown "QEMU refuses DIMMs that are correct: $message"
dimms=
dimm 0 share=off
accepts || refused share
[ "$device" = spapr-nvdimm ] || shown "QEMU starts"
bare store
grep -q '^H_SCM_FLUSH = 0 ' out || unknown "the program printed: $(tail -n 1 out)"
if grep -aq STORED dimm0; then
	gone "the store is in the file"
fi
shown "H_SCM_FLUSH returned H_SUCCESS, and the file has none of the store"
