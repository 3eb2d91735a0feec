#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# An NVDIMM on memory-backend-memfd, and on a file that QEMU creates and unlinks.
. "$(dirname "$0")/../lib.sh"

expected "QEMU refuses an NVDIMM whose file cannot be opened again"
nvdimm=$device,memdev=m,label-size=128K,uuid=11111111-0000-0000-0000-000000000000
dimm 0
accepts || unknown "QEMU refuses DIMMs that are correct: $message"
dimms=
found=
for backend in memory-backend-memfd,share=on memory-backend-file,share=on,mem-path=.; do
	if accepts -object "$backend,id=m,size=262272K" -device "$nvdimm"; then
		found="$found $backend"
	fi
done
[ -z "$found" ] || shown "QEMU starts with$found"
refused 'file|unlinked|volatile'
