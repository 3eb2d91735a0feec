#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# Two NVDIMMs with the same uuid.
. "$(dirname "$0")/../lib.sh"

expected "QEMU refuses the second NVDIMM"
dimm 0
dimm 1
accepts || unknown "QEMU refuses DIMMs that are correct: $message"
dimms=
dimm 0
dimm 1 -- uuid=11111111-0000-0000-0000-000000000000
accepts || refused uuid
shown "QEMU starts"
