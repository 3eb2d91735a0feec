#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# Begin 100,000 flushes of one DIMM, and poll none of them.
. "$(dirname "$0")/../lib.sh"

expected "QEMU limits the number of flushes that a guest has begun and not polled"
dimm 0
bare begin
case $(tail -n 1 out) in
"begun: 100000") shown "QEMU began 100000 flushes, and keeps a state for each" ;;
"begun: "*", then "*) gone "$(tail -n 1 out)" ;;
esac
unknown "QEMU exits with status $status: $message"
