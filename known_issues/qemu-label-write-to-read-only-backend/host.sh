#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# A guest's kernel kills QEMU with one hypervisor call.
. "$(dirname "$0")/../lib.sh"

expected "H_SCM_WRITE_METADATA returns H_P2 (-55), and QEMU goes on"
dimm 0 readonly=on -- unarmed=on
bare write
if [ "$status" -eq 139 ]; then
	shown "QEMU dies of SIGSEGV"
elif [ "$status" -eq 0 ] && grep -q '^H_SCM_WRITE_METADATA = -55 ' out; then
	gone "$(cat out)"
fi
unknown "QEMU exits with status $status: $message"
