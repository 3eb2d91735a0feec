#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# guest.sh REGION: create a devdax namespace with huge pages and page structures in memory.
. "$(dirname "$0")/../lib.sh"

expected "a devdax namespace with an alignment of 2 MiB and map=mem is enabled"
need ndctl
grep -m 1 KernelPageSize /proc/self/smaps | grep -q ' 64 kB' || unknown "the kernel has no pages of 64 KiB"
# If the bug shows, the kernel kills ndctl.
if ndctl create-namespace -f -r "$1" -m devdax -M mem -a 2M > /dev/null 2>&1; then
	gone "ndctl has created and enabled it"
fi
dmesg | grep -q 'memmap_init_compound+' || unknown "ndctl made no namespace"
shown "the kernel crashes in memmap_init_compound"
