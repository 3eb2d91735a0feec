#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# guest.sh REGION: create a namespace in REGION, and write a sector size into its label that no
# version of Linux has. The labels of the DIMM are lost.
. "$(dirname "$0")/../lib.sh"

expected "a label with an unknown sector size is reported by a message, without a warning of the kernel"
need cc
dimm=$(sed 's/,.*//' "/sys/bus/nd/devices/$1/mapping0")
namespace "$1" raw
work=$(mktemp -d)
cc -O1 -Wall -o "$work/sector_size" "$here/sector_size.c" || unknown "sector_size.c does not compile"
ndctl disable-region "$1" && ndctl read-labels -o "$work/labels" "$dimm" || unknown "no labels"
"$work/sector_size" "$work/labels" 4097 || unknown "no label can be changed"
ndctl write-labels -i "$work/labels" "$dimm" || unknown "the labels cannot be written"
rm -r "$work"
dmesg -C
ndctl disable-dimm "$dimm" && ndctl enable-dimm "$dimm" && ndctl enable-region "$1"
warning=$(dmesg | grep -m 1 -A 1 'WARNING: ')
dmesg | grep -i sector
[ -z "$warning" ] || shown "$warning"
dmesg | grep -qi 'sector' || unknown "the kernel says nothing about the sector size"
gone "$(dmesg | grep -i sector | tail -n 1)"
