#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# Unrealize an NVDIMM, which cannot be unplugged, and realize it again.
. "$(dirname "$0")/../lib.sh"

realize_again() {
	echo 'qom-set /machine/peripheral/nv0 realized off'
	echo 'qom-set /machine/peripheral/nv0 realized on'
	echo 'info status'
	echo quit
}

expected "QEMU refuses to unrealize the device"
dimm 0
steps=realize_again
run -S
case $status in
134) shown "QEMU aborts: $message" ;;
0) ! grep -q '^Error:' answers || gone "$(grep '^Error:' answers | head -n 1)" ;;
esac
unknown "QEMU exits with status $status: $message"
