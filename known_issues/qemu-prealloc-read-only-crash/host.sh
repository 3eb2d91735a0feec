#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# Preallocate a read-only backend.
. "$(dirname "$0")/../lib.sh"

expected "QEMU refuses prealloc=on for a read-only backend, or populates it for reading"
truncate -s 64M file
if accepts -object memory-backend-file,id=m,mem-path=file,share=on,readonly=on,prealloc=on,size=64M
then
	gone "QEMU starts"
fi
[ "$status" -ne 139 ] || shown "QEMU dies of SIGSEGV"
refused 'prealloc'
