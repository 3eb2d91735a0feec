#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# A memory backend of 2^64 - 1 bytes.
. "$(dirname "$0")/../lib.sh"

expected "QEMU refuses the size with a message"
accepts -object memory-backend-ram,id=m,size=18446744073709551615 || true
case $status in
134) shown "QEMU aborts: $message" ;;
1) ! grep -q 18446744073709551615 err || gone "$message" ;;
esac
unknown "QEMU exits with status $status: $message"
