#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# guest.sh REGION: map a devdax namespace in REGION, which is asynchronous, with MAP_SYNC.
. "$(dirname "$0")/../lib.sh"

expected "mmap() of devdax with MAP_SYNC fails with EOPNOTSUPP, as for fsdax, if stores need a flush by the hypervisor"
asynchronous "$1"
namespace "$1" devdax -a 2M
map_sync "/dev/$device" 2m
[ "$granted" = no ] || shown "MAP_SYNC is granted on /dev/$device"
gone "MAP_SYNC is refused on /dev/$device: $text"
