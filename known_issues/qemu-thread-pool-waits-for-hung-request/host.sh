#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# Two flushes at the same time, each of which takes 100 ms, while a worker of the pool is idle.
. "$(dirname "$0")/../lib.sh"

expected "two flushes of 100 ms each run at the same time"
need strace
dimm 0
# A worker wakes up late.
tracer='strace -f -qq -o calls -e trace=fdatasync,futex -e inject=fdatasync:delay_enter=100ms'
tracer="$tracer -e inject=futex:delay_exit=1ms"
bare pairs
case $(tail -n 1 out) in
"one after the other: 0 of 50") gone "50 of 50 pairs ran at the same time" ;;
"one after the other: "*) shown "$(tail -n 1 out) pairs" ;;
esac
unknown "QEMU exits with status $status: $message"
