#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# The machine option dumpdtb=.
. "$(dirname "$0")/../lib.sh"

expected "QEMU writes the device tree, and exits with status 0"
machine=$machine,dumpdtb=tree
run
if [ "$status" -eq 0 ] && grep -aq 'ibm,phandle\|ibm,associativity' tree; then
	gone "QEMU has written $(wc -c < tree) bytes"
elif [ "$status" -eq 1 ] && grep -q 'FDT' err; then
	shown "QEMU exits with status 1: $message"
fi
unknown "QEMU exits with status $status: $message"
