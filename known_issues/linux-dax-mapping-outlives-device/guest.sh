#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# guest.sh REGION: make an ext4 with DAX on REGION, map a file, and remove the disk.
. "$(dirname "$0")/../lib.sh"

expected "a load through a mapping of a file raises SIGBUS after the disk was removed"
need cc
cc -Wall -o load "$here/load.c" || unknown "load.c does not compile"
namespace "$1" fsdax
dax_file "/dev/$device"
owner=$(readlink -f "/sys/block/$device/device")
driver=$(readlink -f "$owner/driver")
rm -f mapped gone
./load /mnt/file &
for _ in $(seq 100); do
	[ ! -e mapped ] || break
	sleep 0.1
done
[ -e mapped ] || unknown "the file is not mapped"
echo "${owner##*/}" > "$driver/unbind" || unknown "${owner##*/} is not unbound"
[ ! -e "/sys/block/$device" ] || unknown "$device is still there"
touch gone
wait $!
status=$?
umount /mnt
echo "${owner##*/}" > "$driver/bind"
case $status in
0) gone "the load raises SIGBUS" ;;
1) shown "the load succeeds" ;;
*) unknown "the file cannot be mapped" ;;
esac
