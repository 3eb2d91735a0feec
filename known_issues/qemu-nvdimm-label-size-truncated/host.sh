#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# An NVDIMM with a label area of 4 GiB.
. "$(dirname "$0")/../lib.sh"

dump() {
	echo dumpdtb tree
	echo quit
}

expected "QEMU refuses a label-size that does not fit into the 32 bits of ibm,metadata-size"
truncate -s 4352M dimm0
dimm 0 size=4352M -- label-size=256M
accepts || unknown "QEMU refuses DIMMs that are correct: $message"
dimms=
dimm 0 size=4352M -- label-size=4G
accepts || refused label
steps=dump
run -S
found="QEMU starts"
if command -v fdtget > /dev/null; then
	size=$(fdtget tree /ibm,persistent-memory/ibm,pmemory@90000000 ibm,metadata-size)
	found="$found, and ibm,metadata-size is $size"
fi
shown "$found"
