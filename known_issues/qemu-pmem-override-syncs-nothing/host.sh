#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# A flush with pmem-override=on on an ordinary file: H_SCM_FLUSH succeeds without a sync of the file.
. "$(dirname "$0")/../lib.sh"

expected "H_SCM_FLUSH makes a store durable, or QEMU refuses pmem=on for a file that is not DAX"
need strace
dimm 0 pmem=on -- pmem-override=on
accepts || refused 'DAX'
tracer='strace -f -y -qq -o calls -e trace=fdatasync,fsync,msync,sync_file_range'
bare store
grep -q '^H_SCM_FLUSH = 0 ' out || unknown "the program printed: $(tail -n 1 out); $message"
grep -q 'non DAX' err || unknown "the file is DAX"
if grep -Eq 'msync.*MS_SYNC|sync\([0-9]*<.*dimm0>' calls; then
	gone "$(grep -E 'msync|dimm0' calls | tail -n 1)"
fi
shown "H_SCM_FLUSH returned H_SUCCESS, without fdatasync, fsync or msync"
