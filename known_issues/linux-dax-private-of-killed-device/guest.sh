#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# guest.sh REGION: make a devdax namespace in REGION, which may be of any machine, and remove the
# device while two processes open and map it. After an Oops the guest needs a reset.
. "$(dirname "$0")/../lib.sh"

# oopses: number of the kernel's messages about a NULL pointer.
oopses() {
	dmesg | grep -ci "NULL pointer dereference"
}

# files NAME…: wait until each file exists, for at most 10 s.
files() {
	for _ in $(seq 100); do
		for name; do
			[ -e "$name" ] || break
		done
		[ ! -e "$name" ] || return 0
		sleep 0.1
	done
	return 1
}

expected "open() or mmap() of a DAX device that goes fails with ENXIO"
need cc
cc -Wall -o open "$here/open.c" || unknown "open.c does not compile"
namespace "$1" devdax
driver=$(readlink -f "/sys/bus/dax/devices/$device/driver")
before=$(oopses)
for round in $(seq 20); do
	rm -f begun.* status.* unbound
	for number in 1 2; do
		(./open "/dev/$device" begun.$number; echo $? > status.$number) &
	done
	files begun.1 begun.2 || unknown "$device cannot be opened and mapped"
	(echo "$device" > "$driver/unbind"; : > unbound) &
	# A process that dies in the driver may never end, and then the unbind does not, either.
	files status.1 status.2 unbound
	[ "$(oopses)" -eq "$before" ] || shown "an Oops in round $round: NULL pointer dereference"
	[ "$(cat status.1 status.2)" = "0
0" ] || unknown "the processes end with status $(cat status.1 status.2)"
	echo "$device" > "$driver/bind"
done
gone "both processes get ENXIO in each of 20 rounds"
