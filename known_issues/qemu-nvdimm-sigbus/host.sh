#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# Store 16 MiB to a DIMM whose file is on a file system of 8 MiB.
. "$(dirname "$0")/../lib.sh"

status_later() {
	await '^stored' out
	sleep 2
	echo info status
	echo quit
}

need unshare
if [ -z "$PRIVATE_MOUNTS" ]; then
	unshare -rm true || unknown "this user may not mount in a namespace"
	PRIVATE_MOUNTS=1 exec unshare -rm sh "$0"
fi
expected "the machine stops until there is space, as for a disk (werror=stop), or the store fails"
mkdir small
mount -t tmpfs -o size=8m none small || unknown "no file system of 8 MiB"
truncate -s 262272K small/file
dimm 0 mem-path=small/file
steps=status_later
bare store
case $status in
135) shown "QEMU dies of SIGBUS after $(grep -c stored out) MiB, with the message '$message'" ;;
0) ! grep -q '^VM status: paused (io-error)' answers || gone "QEMU has stopped the machine" ;;
1) ! grep -qi 'space' err || gone "QEMU does not start: $message" ;;
esac
unknown "QEMU exits with status $status: $message"
