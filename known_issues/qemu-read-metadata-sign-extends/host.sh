#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# Read four bytes of the label area, the first of which is 0x80.
. "$(dirname "$0")/../lib.sh"

expected "H_SCM_READ_METADATA returns r4 = 0x80000001"
dimm 0
bare read
case $(grep '^H_SCM_READ_METADATA = 0 ' out) in
*"(r4 0xffffffff80000001)") shown "r4 is 0xffffffff80000001" ;;
*"(r4 0x80000001)") gone "r4 is 0x80000001" ;;
esac
unknown "QEMU exits with status $status: $(tail -n 1 out err)"
