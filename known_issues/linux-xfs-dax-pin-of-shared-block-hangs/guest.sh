#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# guest.sh REGION: make an XFS with DAX and a raw namespace on REGION, and write a page of a mapped
# file to the raw disk, before and after the file is cloned.
. "$(dirname "$0")/../lib.sh"

expected "a write of a mapped page ends, also if the file shares its blocks"
need cc timeout
cc -Wall -o pin pin.c || unknown "pin.c does not compile"
pin=$PWD/pin
region=$1
namespace "$region" raw -s 32M
disk=/dev/$device
namespace "$region" fsdax
xfs_with_dax "/dev/$device"
xfs_io -f -c "pwrite -q 0 $page" /mnt/a
timeout 30 "$pin" /mnt/a "$disk" || unknown "the write of a page that is not shared fails ($?)"
cp --reflink=always /mnt/a /mnt/b || unknown "no reflink"
timeout 30 "$pin" /mnt/a "$disk"
case $? in
0) gone "the write of a shared page ends" ;;
124) shown "the write of a shared page does not end within 30 s, the one before took less" ;;
*) unknown "the write of a shared page fails" ;;
esac
