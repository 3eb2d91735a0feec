#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
#
# Inspect and prepare the nvdimms of a guest, in one round trip.
#
# Run as `sh -s STEP...` with its settings exported; prints lines for paprscm/pmem/dump.py:
#
#     found REGION NODE DEVICE     one for each region; NODE is "-" if it is unknown
#     text KEY VALUE               the first line of a file, or a fact
#     blob KEY                     followed by the content in hex, in the format of `od -An -v -tx1`
#     file SIZE MODE NAME          a property in the blob "props", in order; or the path of another file
#     step STEP                    this step begins
#     done                         all steps succeeded
#
# The step "find" exits with 3 if no region has that DRC index; the others exit with the status of
# the failed command. Settings: drc (hex), wait_s; ns_mode, ns_map, ns_size, ns_align of a namespace
# (the last three may be empty: ndctl's default); disk, fstype, block_size (empty: the page size),
# mkfs_configs (folder of mkfs.xfs's configuration files, if not the default one), mountpoint,
# options; table, the last 66 bytes of an MBR in printf's notation; sysfs, its mount point.
#
# The settings come from the environment, and ndctl's options are split into words on purpose.
# shellcheck disable=SC2086,SC2154
set -eu

: "${sysfs:=/sys}"
# arch/powerpc/platforms/pseries/papr_scm.c: the node of an nvdimm, and its parent.
parent=ibm,persistent-memory nvdimm=ibm,pmemory

fact() { printf 'text %s %s\n' "$1" "$2"; }

# Print the first line of a sysfs file, without a new process: those are slow under TCG.
text() {
	line=
	[ -e "$2" ] || return 0
	IFS= read -r line < "$2" || :
	fact "$1" "$line"
}

# Set at to the real path of a folder. By cd, because processes are slow under TCG.
at() {
	cd -P "$1" 2>/dev/null && at=$PWD
}

now() {
	read -r up rest < /proc/uptime
	now=${up%%.*}
}

# Set region, device and node for $drc; fail if there is no such region.
look() {
	found='' region='' trouble=''
	for dir in "$sysfs"/bus/nd/devices/region*; do
		at "$dir" || continue
		here=$at at=''
		if ! at "$dir/of_node"; then
			# Without this link, the name of the region's bus contains the node's path.
			provider=
			IFS= read -r provider < "$here/../provider" || :
			at "$sysfs/firmware/devicetree/base/${provider%%:*}/${provider#*:}" || at=
		fi
		found="$found
found ${dir##*/} ${at:--} $here"
		case $at in
		*/"$parent/$nvdimm@$drc") ;;
		*) continue ;;
		esac
		if [ -n "$region" ]; then
			trouble="both $region and ${dir##*/} are of drc $drc"
		fi
		region=${dir##*/} device=$here node=$at
	done
	if [ -n "$region" ] && [ ! -e "$device/driver" ]; then
		trouble="$region has no driver"
	fi
	[ -n "$region" ] && [ -z "$trouble" ]
}

step_find() {
	now
	end=$((now + wait_s))
	until look; do
		now
		if [ "$now" -ge "$end" ]; then
			[ -z "$found" ] || printf '%s\n' "${found#?}"
			[ -z "$trouble" ] || fact trouble "$trouble"
			exit 3
		fi
		sleep 0.05
	done
	printf '%s\n' "${found#?}"
	# This read returns when the bus has probed all its devices.
	text wait_probe "$device/../wait_probe"
	fact region "$region"
	fact device "$device"
	fact node "$node"
	for key in deep_flush persistence_domain size read_only align nstype mapping0; do
		text $key "$device/$key"
	done
	# The last value read by text is mapping0, "nmem0,0,536870912,0", or empty.
	dimm=$sysfs/bus/nd/devices/${line%%,*}
	for key in flags papr/flags papr/dirty_shutdown; do
		text $key "$dimm/$key"
	done
	flush=$device/deep_flush
	[ -e "$flush" ] || flush=
	at "$node"
	set --
	for file in *; do
		[ ! -f "$file" ] || set -- "$@" "$file"
	done
	# All in one process.
	stat -c 'file %s %a %n' -- "$@" ${flush:+"$flush"}
	printf 'blob props\n'
	od -An -v -tx1 -- "$@"
}

# Print the device path of $name ($at), which must be below the region. Set disk.
place() {
	fact "$name/device" "$at"
	# Never make a file system on a device of another region.
	case $at in
	"$device"/*) ;;
	*) echo "$name is $at, which is not below $device" >&2; exit 1 ;;
	esac
	disk=/dev/$name
}

# Print the sysfs attributes of block device $name. Set disk.
block_device() {
	at "$sysfs/block/$name/device"
	for key in ro size queue/fua queue/dax queue/write_cache queue/logical_block_size; do
		text "$name/$key" "$sysfs/block/$name/$key"
	done
	place
}

# Print the sysfs attributes of device $name. Set disk.
device() {
	if [ -e "$sysfs/block/$name" ]; then
		block_device
	elif at "$sysfs/bus/dax/devices/$name"; then
		for key in size align; do
			text "$name/$key" "$at/$key"
		done
		place
	else
		echo "sysfs has no $name" >&2
		exit 1
	fi
}

# Print ndctl's output ($1), and the sysfs attributes of each device in it. Set disk to the path of
# the last device, and disks to their number.
devices() {
	printf 'blob ndctl\n'
	printf '%s' "$1" | od -An -v -tx1
	disks=0
	names=$(printf '%s\n' "$1" |
		sed -n -e 's/.*"blockdev" *: *"\([^"]*\)".*/\1/p' \
			-e 's/.*"chardev" *: *"\([^"]*\)".*/\1/p')
	for name in $names; do
		device
		disks=$((disks + 1))
	done
}

step_namespace() {
	made=$(ndctl create-namespace -f -r "$region" -m "$ns_mode" ${ns_map:+-M "$ns_map"} \
		${ns_size:+-s "$ns_size"} ${ns_align:+-a "$ns_align"})
	devices "$made"
	[ $disks = 1 ] || { echo "ndctl lists $disks devices, not one" >&2; exit 1; }
}

step_namespaces() {
	made=$(ndctl list -N -r "$region")
	devices "$made"
}

# Find the only namespace of mode $ns_mode in sysfs: ndctl takes 0.25 s under TCG.
step_present() {
	case $ns_mode in
	raw) set -- "$device"/namespace*/block/* ;;
	sector) set -- "$device"/btt*/block/* ;;
	fsdax) set -- "$device"/pfn*/block/* ;;
	devdax) set -- "$device"/dax*/dax[0-9]* ;;
	*) echo "no mode $ns_mode" >&2; exit 1 ;;
	esac
	disks=0
	for dir in "$@"; do
		[ -d "$dir" ] || continue
		disks=$((disks + 1)) name=${dir##*/} owner=${dir%/*}
	done
	[ $disks = 1 ] || { echo "$region has $disks $ns_mode namespaces, not one" >&2; exit 1; }
	owner=${owner%/block}
	fact present_owner "${owner##*/}"
	for key in namespace mode uuid; do
		text "present_$key" "$owner/$key"
	done
	fact present_device "$name"
	device
}

# Write back all data to the DIMM.
step_sync() {
	sync
}

# Set page_size.
look_at_page() {
	while read -r key size _; do
		[ "$key" != KernelPageSize: ] || break
	done < /proc/self/smaps
	page_size=$((size * 1024))
}

# Set number: for "6.12.117-rc1+" it is 6012.
to_number() {
	number=${1#*.}
	number=$((${1%%.*} * 1000 + ${number%%[!0-9]*}))
}

# Set features, options of mkfs.xfs. By default, a mkfs.xfs newer than the kernel may use features
# that the kernel cannot mount; it has a file with the defaults of each long-term kernel. A mkfs.xfs
# that is not newer gets no file: the one of xfsprogs 6.1.0 for Linux 6.1 is broken.
choose_features() {
	features=
	version=$(mkfs.xfs -V)
	version=${version##* }
	case $version in [0-9]*.[0-9]*) ;; *) echo "mkfs.xfs -V: $version" >&2; exit 1 ;; esac
	read -r release < /proc/sys/kernel/osrelease
	to_number "$release"
	kernel=$number
	to_number "$version"
	[ $number -gt $kernel ] || return 0
	newest=0
	for file in "${mkfs_configs:-/usr/share/xfsprogs/mkfs}"/lts_[0-9]*.conf; do
		[ -e "$file" ] || continue
		version=${file##*/lts_}
		to_number "${version%.conf}"
		if [ $number -le $kernel ] && [ $number -gt $newest ]; then
			newest=$number
			features="-c options=$file"
		fi
	done
}

step_filesystem() {
	look_at_page
	block_size=${block_size:-$page_size}
	case $fstype in
	xfs)
		choose_features
		mkfs.xfs -q -f $features -b size="$block_size" "$disk" >&2
		;;
	# Not lazily: the kernel would keep writing and flushing in the background.
	ext4) mkfs.ext4 -q -F -b "$block_size" -E lazy_itable_init=0,lazy_journal_init=0 "$disk" >&2 ;;
	*) echo "no mkfs for $fstype" >&2; exit 1 ;;
	esac
}

step_mount() {
	[ -d "$mountpoint" ] || mkdir -p "$mountpoint"
	mount -t "$fstype" -o "$options" "$disk" "$mountpoint"
	at "$mountpoint"
	mountpoint=$at
	seen=
	while read -r source target type opts rest; do
		[ "$target" != "$mountpoint" ] || seen="$source $type $opts"
	done < /proc/self/mounts
	[ -n "$seen" ] || { echo "$mountpoint is not in /proc/self/mounts" >&2; exit 1; }
	look_at_page
	fact page_size $page_size
	fact block_size "$(stat -f -c %S .)"
	fact mountpoint "$mountpoint"
	fact mount_device "${seen%% *}"
	seen=${seen#* }
	fact mount_fstype "${seen% *}"
	fact mount_options "${seen#* }"
}

step_try_mount() {
	[ -d "$mountpoint" ] || mkdir -p "$mountpoint"
	before=$(dmesg -t | wc -l)
	# strace, because mount programs replace an errno by their own text; busybox, because it
	# uses mount(2). If a read-write mount fails, it tries read-only: use the first result.
	answers=$(strace -qq -e trace=mount -e signal=none busybox mount -t "$fstype" \
		${options:+-o "$options"} "$disk" "$mountpoint" 2>&1 | sed -n 's/^mount(.*) = //p')
	answer=${answers%%"
"*}
	fact mount_answer "${answer%% (*}"
	printf 'blob messages\n'
	dmesg -t | tail -n "+$((before + 1))" | od -An -v -tx1
}

step_partition() {
	# shellcheck disable=SC2059 # The table is octal escapes.
	{ head -c 446 /dev/zero; printf "$table"; } | dd of="$disk" bs=512 conv=fsync status=none
	# BLKPG for each entry: the kernel may lack support for partition tables.
	partx --add "$disk"
	for dir in "$sysfs/block/${disk##*/}/${disk##*/}p"*; do
		text "${dir##*/}/start" "$dir/start"
		text "${dir##*/}/size" "$dir/size"
	done
}

main() {
	for step in "$@"; do
		echo "step $step"
		"step_$step"
	done
	echo 'done'
}

main "$@" < /dev/null
