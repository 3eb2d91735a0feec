#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# Dump the device trees of a machine whose nodes have the distances 11 and 12.
. "$(dirname "$0")/../lib.sh"

dump() {
	echo dumpdtb tree
	echo quit
}

# associativity DISTANCE: set $levels to the associativity of the second node's memory, 4 numbers.
associativity() {
	steps=dump
	run -S -object memory-backend-ram,id=r0,size=256M -object memory-backend-ram,id=r1,size=256M \
		-numa node,memdev=r0 -numa node,memdev=r1 -numa "dist,src=0,dst=1,val=$1"
	levels=$(od -An -v -tx1 -w4 tree | tr -d ' ' | sed 's/^0000000//' | tr '\n' ' ' |
		grep -o ' 4 [01] [01] [01] 1 ' | head -n 1 | cut -c4-10)
}

expected "the distances 11 and 12 are both rounded to 20"
associativity 12
[ "$levels" = "0 0 0 1" ] || unknown "associativity '$levels' for 12; $message"
associativity 11
case $levels in
"0 0 0 1") gone "the associativity is 0 0 0 1 for both" ;;
"1 1 1 1") shown "the associativity is 0 0 0 1 for 12, and 1 1 1 1, as for 160, for 11" ;;
esac
unknown "associativity '$levels' for 11; $message"
