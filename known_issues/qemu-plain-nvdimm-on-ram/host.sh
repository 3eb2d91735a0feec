#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# A plain nvdimm on memory-backend-ram.
. "$(dirname "$0")/../lib.sh"

expected "QEMU refuses an NVDIMM without a file, or warns"
accepts -object memory-backend-ram,id=m,size=262272K \
	-device nvdimm,memdev=m,label-size=128K,uuid=11111111-0000-0000-0000-000000000000 ||
	refused 'file|volatile|persist'
if [ -s err ]; then
	gone "QEMU warns: $message"
fi
shown "QEMU starts without a message"
