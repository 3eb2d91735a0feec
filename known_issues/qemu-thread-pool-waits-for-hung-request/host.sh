#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# Flushes that begin at the same time, one more than there are idle workers.
. "$(dirname "$0")/../lib.sh"

expected "all of them run at the same time"
need strace
dimm 0
tracer='strace -f -qq -o calls -e trace=fdatasync -e inject=fdatasync:delay_enter=1s'
bare rounds
case $(tail -n 1 out) in
"late: 0") gone "in each of 8 rounds, all flushes ran at the same time" ;;
"late: 1") unknown "in 1 of 8 rounds, one flush was late: the bug, or a busy host" ;;
"late: "*) shown "in $(sed -n 's/^late: //p' out) of 8 rounds, one flush waited for another" ;;
esac
unknown "QEMU exits with status $status: $message"
