#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# Let a flush fail, and ask for the DIMM's health.
. "$(dirname "$0")/../lib.sh"

expected "H_SCM_HEALTH reports that the DIMM could not persist its contents"
need strace
dimm 0
tracer='strace -f -qq -o calls -e trace=fdatasync -e inject=fdatasync:error=EIO'
bare health
grep -q '^H_SCM_FLUSH = -1 ' out || unknown "no flush failed; QEMU's status is $status: $message"
case $(grep '^H_SCM_HEALTH = 0 ' out) in
*"(r4 0x0)") shown "after H_SCM_FLUSH has returned H_HARDWARE, the health bitmap is 0" ;;
*"(r4 0x"*) gone "$(grep H_SCM_HEALTH out)" ;;
esac
unknown "QEMU exits with status $status: $message"
