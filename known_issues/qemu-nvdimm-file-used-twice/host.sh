#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# Two NVDIMMs on the same file.
. "$(dirname "$0")/../lib.sh"

expected "QEMU refuses the second NVDIMM"
dimm 0
dimm 1
accepts || unknown "QEMU refuses DIMMs that are correct: $message"
dimms=
dimm 0
dimm 1 mem-path=dimm0
accepts || refused 'lock|in use|already'
shown "QEMU starts"
