#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# Save a POWER9 machine of a type that QEMU 7.2 has, too, and look for the version of its cpu/slb.
. "$(dirname "$0")/../lib.sh"

expected "the subsection cpu/slb has version 1, the only one that QEMU before 9.2 accepts"
machine=pseries-7.2,x-vof=on
steps=save
run -S -cpu power9_v2.0
saved
version=$(tr -d '\n' < state | tr '\0\1\2' '012' | grep -ao 'cpu/slb000[012]' | head -n 1)
case $version in
cpu/slb0001) gone "cpu/slb has version 1" ;;
cpu/slb0002) shown "cpu/slb has version 2" ;;
esac
unknown "the stream has no subsection cpu/slb"
