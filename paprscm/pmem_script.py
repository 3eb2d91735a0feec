# SPDX-License-Identifier: GPL-2.0-or-later
"""The shell script that looks at and prepares an nvdimm inside the guest, in one round trip.

Run as `env drc=… wait_s=… … sh -s STEP…`, it prints lines that `pmem` parses:

    found REGION NODE DEVICE     one for each region that there is; NODE may be "-"
    text KEY VALUE               the first line of a file, or a fact
    blob KEY                     followed by the content in hex, as `od -An -v -tx1` writes it
    step STEP                    this step begins
    done                         all steps succeeded

The step "find" exits with 3 if there is no region of that DRC index; the others end with the
status of whatever failed. Settings: drc (in hex), wait_s, disk, fstype, block_size (empty: the
page size), mountpoint, options.
"""

from __future__ import annotations

from paprscm.papr import NODE, PARENT_NODE

_SCRIPT = r"""
set -eu

fact() { printf 'text %s %s\n' "$1" "$2"; }

# The first line of a sysfs file, without starting a process: those are slow under TCG.
text() {
	[ -e "$2" ] || return 0
	line=
	IFS= read -r line < "$2" || :
	fact "$1" "$line"
}

blob() {
	printf 'blob %s\n' "$1"
	od -An -v -tx1 "$2"
}

real() { (cd -P "$1" && pwd -P); }

uptime_s() {
	read -r up rest < /proc/uptime
	echo "${up%%.*}"
}

# Sets region, device and node to those of $drc; fails if there are none.
look() {
	found= region= trouble=
	for dir in @SYSFS@/bus/nd/devices/region*; do
		[ -e "$dir" ] || continue
		here=$(real "$dir") || continue
		of=
		[ ! -e "$dir/of_node" ] || of=$(real "$dir/of_node") || continue
		found="$found
found ${dir##*/} ${of:--} $here"
		case "$of" in
		*/@NODE@@$drc) ;;
		'')
			# Without the link, the platform device's name tells.
			case "$here" in
			*/@PARENT@:@NODE@@$drc/*) of=$(real "$here/../../of_node") || continue ;;
			*) continue ;;
			esac
			;;
		*) continue ;;
		esac
		if [ -n "$region" ]; then
			trouble="both $region and ${dir##*/} are of drc $drc"
		fi
		region=${dir##*/} device=$here node=$of
	done
	if [ -n "$region" ] && [ ! -e "$device/driver" ]; then
		trouble="$region has no driver"
	fi
	[ -n "$region" ] && [ -z "$trouble" ]
}

step_find() {
	end=$(($(uptime_s) + wait_s))
	until look; do
		if [ "$(uptime_s)" -ge "$end" ]; then
			[ -z "$found" ] || printf '%s\n' "${found#?}"
			[ -z "$trouble" ] || fact trouble "$trouble"
			exit 3
		fi
		sleep 0.05
	done
	printf '%s\n' "${found#?}"
	# Returns when the bus has probed all that it has.
	text wait_probe "$device/../wait_probe"
	fact region "$region"
	fact device "$device"
	fact node "$node"
	for key in deep_flush persistence_domain size read_only align nstype mapping0; do
		text $key "$device/$key"
	done
	[ ! -e "$device/deep_flush" ] || fact deep_flush_mode "$(stat -c %a "$device/deep_flush")"
	line=
	[ ! -e "$device/mapping0" ] || IFS= read -r line < "$device/mapping0"
	dimm=@SYSFS@/bus/nd/devices/${line%%,*}
	for key in flags papr/flags papr/dirty_shutdown; do
		text $key "$dimm/$key"
	done
	for file in "$node"/*; do
		[ ! -f "$file" ] || blob "prop:${file##*/}" "$file"
	done
}

step_namespace() {
	made=$(ndctl create-namespace -r "$region" -m fsdax -f)
	printf 'blob ndctl\n'
	printf '%s' "$made" | od -An -v -tx1
	name=$(printf '%s\n' "$made" | sed -n 's/.*"blockdev":"\([^"]*\)".*/\1/p')
	[ -n "$name" ] || { echo 'ndctl names no blockdev' >&2; exit 1; }
	owner=$(real "@SYSFS@/block/$name/device")
	fact disk_device "$owner"
	# Never make a file system on what is not this region's.
	case $owner in
	"$device"/*) ;;
	*) echo "$name is $owner, which is not below $device" >&2; exit 1 ;;
	esac
	for key in fua dax write_cache; do
		text queue/$key "@SYSFS@/block/$name/queue/$key"
	done
	disk=/dev/$name
}

step_filesystem() {
	while read -r key size unit; do
		[ "$key" != KernelPageSize: ] || break
	done < /proc/self/smaps
	page_size=$((size * 1024))
	block_size=${block_size:-$page_size}
	fact page_size $page_size
	fact block_size "$block_size"
	case $fstype in
	xfs) mkfs.xfs -q -f -b size="$block_size" "$disk" ;;
	# Not lazily: the kernel would go on writing, and flushing, in the background.
	ext4) mkfs.ext4 -q -F -b "$block_size" -E lazy_itable_init=0,lazy_journal_init=0 "$disk" ;;
	*) echo "no mkfs for $fstype" >&2; exit 1 ;;
	esac
}

step_mount() {
	mkdir -p "$mountpoint"
	mount -t "$fstype" -o "$options" "$disk" "$mountpoint"
	mountpoint=$(real "$mountpoint")
	seen=
	while read -r source target type opts rest; do
		[ "$target" != "$mountpoint" ] || seen="$source $type $opts"
	done < /proc/self/mounts
	[ -n "$seen" ] || { echo "$mountpoint is not in /proc/self/mounts" >&2; exit 1; }
	fact mountpoint "$mountpoint"
	fact mount_device "${seen%% *}"
	seen=${seen#* }
	fact mount_fstype "${seen% *}"
	fact mount_options "${seen#* }"
}

main() {
	for step in "$@"; do
		echo "step $step"
		"step_$step"
	done
	echo done
}

main "$@" < /dev/null
"""


def script(sysfs: str = "/sys") -> str:
    """The script's text, looking for devices below `sysfs`."""
    text = _SCRIPT.replace("@NODE@", NODE).replace("@PARENT@", PARENT_NODE)
    return text.replace("@SYSFS@", sysfs)
