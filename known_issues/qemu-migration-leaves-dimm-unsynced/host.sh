#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# Migrate a machine to a QEMU with another file behind the DIMM, and look for a sync of that file.
. "$(dirname "$0")/../lib.sh"

load() {
	echo 'migrate_incoming "exec:cat state"'
	loaded
	echo quit
}

expected "the destination has synced the file when it reports that the migration has completed"
need strace
dimm 0
steps=save
run -S
saved
rm dimm0
dimms=
dimm 0
tracer='strace -f -y -qq -o calls -e trace=fdatasync,fsync,msync,sync_file_range'
steps=load
run -S -incoming defer
grep '^VM status' answers | tail -n 1 | grep -qv inmigrate ||
	unknown "the machine was not loaded; QEMU's status is $status: $message"
if grep -Eq 'msync.*MS_SYNC|sync\([0-9]*<.*dimm0>' calls; then
	gone "$(grep -E 'msync|dimm0' calls | tail -n 1)"
fi
shown "no fdatasync, fsync or msync of the file"
