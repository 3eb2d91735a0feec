#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# Four command lines that QEMU is right to refuse, and the numbers in its messages.
. "$(dirname "$0")/../lib.sh"

# wrong PATTERN OPTION…: a message that matches has a wrong number.
wrong() {
	pattern=$1
	shift
	if accepts "$@"; then
		unknown "QEMU starts with $*"
	fi
	[ "$status" -eq 1 ] && [ -n "$message" ] || unknown "QEMU exits with status $status for $*"
	! grep -Eq "$pattern" err || found="$found; $*: $(grep -E "$pattern" err)"
}

expected "each message has the number of the command line that is wrong"
found=
wrong '0-18446744073709551615' -m 256M,slots=0,maxmem=256M -object memory-backend-ram,id=m,size=256M \
	-device pc-dimm,memdev=m,slot=0
wrong 'memory size 0x0' -object \
	"memory-backend-file,id=m,mem-path=file,share=on,size=18446744073709551615"
if [ "$device" = spapr-nvdimm ]; then
	wrong '0x10000000 is not aligned' -m 256M,slots=4,maxmem=8100M
	wrong 'ldMiB' -m 64M,slots=0,maxmem=64M
fi
[ -z "$found" ] || shown "${found#; }"
gone "none of the wrong numbers"
