#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# A guest's kernel aborts QEMU with one hypervisor call.
. "$(dirname "$0")/../lib.sh"

expected "H_SCM_UNBIND_MEM returns H_P3 (-56), and QEMU goes on"
dimm 0
bare unbind
if [ "$status" -eq 134 ]; then
	shown "QEMU aborts: $(grep -o 'Assertion .*' err)"
elif [ "$status" -eq 0 ] && grep -q '^H_SCM_UNBIND_MEM = -56 ' out; then
	gone "$(cat out)"
fi
unknown "QEMU exits with status $status, and prints: $(tail -n 1 out err)"
