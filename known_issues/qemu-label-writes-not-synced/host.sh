#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# Write to the label area of an NVDIMM on an ordinary file, and look for a sync of the file.
. "$(dirname "$0")/../lib.sh"

expected "H_SCM_WRITE_METADATA makes the bytes durable in the file"
need strace
dimm 0
tracer='strace -f -y -qq -o calls -e trace=fdatasync,fsync,msync,sync_file_range'
bare label
grep -q '^H_SCM_WRITE_METADATA = 0 ' out || unknown "the program printed: $(tail -n 1 out); $message"
if grep -Eq 'msync.*MS_SYNC|sync\([0-9]*<.*dimm0>' calls; then
	gone "$(grep -E 'msync|dimm0' calls | tail -n 1)"
fi
shown "H_SCM_WRITE_METADATA returned H_SUCCESS, without fdatasync, fsync or msync"
