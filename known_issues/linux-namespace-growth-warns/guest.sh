#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# guest.sh REGION: make two namespaces in REGION, and let the first one grow.
. "$(dirname "$0")/../lib.sh"

# $name is a new namespace of 32 MiB.
make() {
	name=$(ndctl create-namespace -r "$1" -m raw -s 32M | sed -n 's/.*"dev":"\([^"]*\)".*/\1/p')
	[ -n "$name" ] || unknown "ndctl made no namespace in $1"
}

expected "a namespace that cannot grow in place is refused without a kernel warning"
need ndctl
ndctl destroy-namespace -f -r "$1" all > /dev/null 2>&1
make "$1"
first=$name
make "$1"
ndctl disable-namespace "$first" > /dev/null || unknown "$first cannot be disabled"
size=$((64 << 20))
if echo "$size" 2> /dev/null > "/sys/bus/nd/devices/$first/size"; then
	unknown "$first can grow"
fi
# The kernel warns once.
warning=$(dmesg | sed -n 's/.*\(allocation underrun: .*\)/\1/p' | head -n 1)
[ -n "$warning" ] || gone "the write fails without a warning"
shown "the kernel warns: $warning"
