#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# Look for ibm,hcall-flush-required in the device tree of a plain nvdimm on an ordinary file.
. "$(dirname "$0")/../lib.sh"

dump() {
	echo dumpdtb tree
	echo quit
}

# flush_required TYPE: true if the device tree of a DIMM of this type has the property.
flush_required() {
	device=$1
	dimms=
	dimm 0
	rm -f tree
	steps=dump
	run -S
	grep -aq 'ibm,pmemory' tree || unknown "QEMU wrote no device tree: $message"
	grep -aq 'ibm,hcall-flush-required' tree
}

expected "a guest of an NVDIMM on a file that is not DAX has to flush it with H_SCM_FLUSH"
flush_required spapr-nvdimm || unknown "spapr-nvdimm does not have the property, either"
if flush_required nvdimm; then
	gone "the device tree has ibm,hcall-flush-required"
fi
shown "the device tree lacks ibm,hcall-flush-required"
