#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# 100 kernels, each of which starts the next one with a flush that it has not polled.
. "$(dirname "$0")/../lib.sh"

expected "after H_SCM_BIND_MEM, H_SCM_FLUSH returns H_P2 (-55) for each token of an earlier kernel"
dimm 0
bare kernels
grep -q '^H_SCM_FLUSH = 0 ' out || unknown "the last kernel's own flush failed; QEMU's status is $status"
case $(tail -n 1 out) in
"kept: 100") shown "QEMU has kept the flushes of 100 earlier kernels" ;;
"kept: 0") gone "QEMU has forgotten the flushes of 100 earlier kernels" ;;
esac
unknown "QEMU exits with status $status: $(tail -n 1 out err)"
