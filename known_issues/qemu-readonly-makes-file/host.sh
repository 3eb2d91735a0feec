#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# A read-only DIMM on a file that does not exist.
. "$(dirname "$0")/../lib.sh"

expected "QEMU refuses the missing file, and does not create it"
dimm 0 readonly=on,mem-path=absent -- unarmed=on
if accepts && [ -e absent ]; then
	shown "QEMU starts, and has created a file of $(wc -c < absent) bytes"
elif [ ! -e absent ]; then
	refused 'no such file'
fi
unknown "QEMU exits with status $status: $message"
