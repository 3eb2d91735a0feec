#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# guest.sh REGION: make a namespace in REGION, which may be of any machine with labels, and give its
# label a sector size of 1000 bytes.
. "$(dirname "$0")/../lib.sh"

warnings() {
	dmesg | grep "WARNING: .*pmem_sector_size+"
}

expected "a label with an unknown sector size causes no kernel warning"
need cc ndctl
cc -Wall -o label label.c || unknown "label.c does not compile"
ndctl destroy-namespace -f -r "$1" all > /dev/null 2>&1
namespace "$1" raw -s 32M
before=$(warnings | wc -l)
dimm=$(cut -d, -f1 "/sys/bus/nd/devices/$1/mapping0")
{
	ndctl disable-region "$1" && ndctl read-labels -o labels "$dimm" && ./label labels &&
		ndctl write-labels -i labels "$dimm"
} > /dev/null 2>&1 || unknown "the labels of $dimm cannot be changed"
ndctl enable-region "$1" > /dev/null 2>&1 || unknown "$1 cannot be enabled"
cat /sys/bus/nd/devices/ndbus*/wait_probe > /dev/null
warning=$(warnings | tail -n +$((before + 1)) | head -n 1)
[ -n "$warning" ] && shown "the kernel warns: $warning"
name=namespace${1#region}.0
[ -e "/sys/bus/nd/devices/$name" ] || gone "the label is refused"
sector=$(cat "/sys/class/block/$device/queue/logical_block_size")
gone "no warning; $device has sectors of $sector bytes"
