#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# guest.sh REGION: make an XFS with DAX on REGION, and deduplicate two blocks in two extents
# against two others in one extent, of which only the first is equal.
. "$(dirname "$0")/../lib.sh"

expected "FIDEDUPERANGE of unequal ranges changes nothing"
namespace "$1" fsdax
xfs_with_dax "/dev/$device"
xfs_io -f -c "pwrite -q -S 1 0 $page" other
xfs_io -f -c "pwrite -q -S 1 0 $((2 * page))" -c "pwrite -q -S 2 $page $page" source
xfs_io -f -c "pwrite -q -S 1 0 $page" -c "reflink other 0 $page $page" data > /dev/null
sync
before=$(cksum < data)
text=$(xfs_io -c "dedupe source 0 0 $((2 * page))" data 2>&1)
after=$(cksum < data)
cd / && umount /mnt
[ "$before" = "$after" ] || shown "the file has other data: $text"
gone "the file has its data: $text"
