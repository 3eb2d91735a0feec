#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# An NVDIMM at an address that is not a multiple of the SCM block size.
. "$(dirname "$0")/../lib.sh"

expected "QEMU refuses an address that is not a multiple of 256 MiB"
dimm 0 -- addr=0x40000000
accepts || unknown "QEMU refuses 0x40000000, too: $message"
dimms=
dimm 0 -- addr=0x40001000
accepts || refused 'addr|align'
shown "QEMU starts with addr=0x40001000"
