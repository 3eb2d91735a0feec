#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# Set the capability postcopy-ram on a destination with a DIMM on an ordinary file.
. "$(dirname "$0")/../lib.sh"

set_capability() {
	echo migrate_set_capability postcopy-ram on
	echo info migrate_capabilities
	echo quit
}

expected "the destination refuses postcopy-ram for a file that userfaultfd does not support"
case $(stat -f -c %T .) in
tmpfs | hugetlbfs) unknown "userfaultfd supports the file system of $PWD" ;;
esac
dimm 0
steps=set_capability
run -S -incoming defer
if grep -Eq 'TMPFS|HUGETLBFS' answers err; then
	gone "$(grep -Eh 'TMPFS|HUGETLBFS' answers err | tail -n 1)"
elif grep -q '^postcopy-ram: on' answers; then
	shown "the destination accepts the capability"
fi
unknown "$(grep -ih error answers err | tail -n 1)"
