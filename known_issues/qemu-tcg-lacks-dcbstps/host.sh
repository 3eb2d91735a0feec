#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# Execute the cache instructions of Power ISA 3.1 for persistent memory.
. "$(dirname "$0")/../lib.sh"

expected "dcbstps and dcbfps are executed, as dcbf is"
bare execute
case $(tail -n 1 out) in
"dcbf: 0, dcbstps: 0, dcbfps: 0") gone "all are executed" ;;
"dcbf: 0, dcbstps: 1, dcbfps: 1") shown "both raise a program interrupt" ;;
esac
unknown "QEMU exits with status $status: $(tail -n 1 out err)"
