#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# guest.sh REGION: make a devdax namespace in REGION, which may be of any machine, and map it.
. "$(dirname "$0")/../lib.sh"

expected "mmap() with an offset that is not a multiple of the alignment fails with EINVAL"
need cc
namespace "$1" devdax -a 2M
cc -Wall -o offset offset.c || unknown "offset.c does not compile"
text=$(./offset "/dev/$device")
case $? in
0) gone "$text" ;;
1) shown "$text" ;;
*) unknown "$text" ;;
esac
