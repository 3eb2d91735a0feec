# SPDX-License-Identifier: GPL-2.0-or-later
# shellcheck shell=sh
#
# Functions of the reproductions, for a POSIX shell: . "$(dirname "$0")/../lib.sh"
#
# A reproduction calls `expected TEXT` once, and ends with `shown TEXT`, `gone TEXT` or
# `unknown TEXT`: exit status 1, 0 or 2. An exit by mistake lacks the line "found: …".

here=$(cd "$(dirname "$0")" && pwd)
qemu=${QEMU:-qemu-system-ppc64}
dimms=
# Words before QEMU's command line, such as strace and its options.
tracer=
# QEMU=qemu-system-x86_64 runs those reproductions that need no program in the guest.
case $qemu in
*x86_64) machine=q35,nvdimm=on device=nvdimm ;;
*) machine=pseries,x-vof=on,nvdimm=on device=spapr-nvdimm ;;
esac

expected() {
	echo "expected: $*"
}

gone() {
	echo "found: $*"
	exit 0
}

shown() {
	echo "found: $*"
	exit 1
}

unknown() {
	echo "found: $*"
	exit 2
}

# need COMMAND…: the reproduction cannot tell without them.
need() {
	for command; do
		command -v "$command" > /dev/null || unknown "$command is not installed"
	done
}

# On the host.

# dimm N [BACKEND-OPTION…] [-- DEVICE-OPTION…]: add a DIMM of 256 MiB with a label area of 128 KiB;
# its file is dimmN. An option replaces an earlier one.
dimm() {
	number=$1
	shift
	[ -e "dimm$number" ] || truncate -s 262272K "dimm$number" || unknown "no file dimm$number"
	words=memory-backend-file,id=mem$number,mem-path=dimm$number,size=262272K,share=on
	while [ $# -gt 0 ] && [ "$1" != -- ]; do
		words=$words,$1
		shift
	done
	[ $# -eq 0 ] || shift
	dimms="$dimms -object $words"
	words=$device,id=nv$number,memdev=mem$number,slot=$number,label-size=128K
	words=$words,uuid=11111111-0000-0000-0000-00000000000$number
	for option; do
		words=$words,$option
	done
	dimms="$dimms -device $words"
}

# A command that prints commands for QEMU's monitor: a function of the script.
steps=:

# await PATTERN FILE: in such a function, wait until a line of FILE matches.
await() {
	for _ in $(seq 200); do
		grep -Eqs "$1" "$2" && return
		sleep 0.1
	done
	exit 1
}

# save: in such a function, save the machine to the file `state`, and end QEMU.
save() {
	echo stop
	echo 'migrate "exec:cat > state"'
	echo quit
}

# progress PATTERN: in such a function, wait until a line of `info migrate` matches.
progress() {
	for _ in $(seq 100); do
		echo info migrate
		sleep 0.1
		grep -Eq "$1" answers && return
	done
	exit 1
}

# loaded: in such a function, wait until an incoming migration has ended.
loaded() {
	for _ in $(seq 200); do
		echo info status
		sleep 0.1
		if grep -a '^VM status' answers | tail -n 1 | grep -qv inmigrate; then
			return
		fi
	done
	exit 1
}

# resume: in such a function, continue a machine after it was loaded.
resume() {
	loaded
	echo cont
}

# run [OPTION…]: start a machine with the DIMMs and $steps on its monitor; print its command line. The
# monitor's answers are in the file `answers`, messages in `err`, the last one in $message, and QEMU's
# exit status, 128 + n for signal n, in $status.
run() {
	: > answers
	# shellcheck disable=SC2086 # $tracer and $dimms are lists of words
	set -- $tracer timeout -k 5 60 "$qemu" -machine "$machine" -accel tcg -m 512M,slots=8,maxmem=8G \
		-nodefaults -display none -no-reboot $dimms -monitor stdio "$@"
	echo "+ $*"
	# A shell of its own, whose messages about a signal are in `err`.
	$steps | ("$@"; exit $?) > answers 2> err
	status=$?
	tr -d '\r' < answers > text && mv text answers
	# Without warnings of each TCG machine, messages of strace, and the shell's name of a signal.
	grep -Ev "TCG doesn't support requested feature|^strace: |^[A-Z][a-z]+( [a-z]+)?$" err > text
	mv text err
	cat err
	message=$(tail -n 1 err)
	[ "$status" -ne 124 ] || unknown "QEMU did not exit within 60 s"
}

# accepts [OPTION…]: true if QEMU starts the machine, false if it ends before it is asked to.
accepts() {
	steps='printf info\040status\nquit\n'
	run -S "$@"
	steps=:
	[ "$status" -eq 0 ] || return 1
	grep -q '^VM status: paused' answers || unknown "QEMU exits with status $status: $message"
}

# refused PATTERN: end, after QEMU has refused the machine; its message must match.
refused() {
	case $status in
	1) ! grep -Eqi "$1" err || gone "QEMU refuses the machine: $message" ;;
	esac
	unknown "QEMU exits with status $status: $message"
}

# saved: end, if the machine was not saved.
saved() {
	[ -s state ] || unknown "the machine was not saved; QEMU's status is $status: $message"
}

# compile PROGRAM: compile PROGRAM.c, which includes bare.h, to ./PROGRAM.
compile() {
	cc=${CC:-powerpc64le-linux-gnu-gcc}
	need "$cc"
	"$cc" -mbig-endian -mabi=elfv2 -mcpu=power8 -msoft-float -mno-altivec -mno-vsx -O1 -Wall \
		-ffreestanding -fno-asynchronous-unwind-tables -nostdlib -static \
		-Wl,-Ttext=0,--build-id=none -o "$1" "$here/$1.c" || unknown "$1.c does not compile"
}

# bare PROGRAM [OPTION…]: `run` PROGRAM.c in a machine with the DIMMs. Its output is in the file
# `out`.
bare() {
	program=$1
	shift
	compile "$program"
	: > out
	run -serial file:out -kernel "$program" "$@"
	# VOF prints carriage returns.
	tr -d '\r' < out > text && mv text out
	# A line that the program has not finished gets its end.
	awk 1 out
}

# In a guest, as root.

# namespace REGION MODE [OPTION…]: create a namespace; $device is its device, without /dev/.
namespace() {
	need ndctl
	region=$1
	shift
	set -- -f -m "$@"
	# The second command is for a region without labels, such as that of virtio-pmem.
	device=$({ ndctl create-namespace -r "$region" "$@" 2> /dev/null ||
		ndctl create-namespace -e "namespace${region#region}.0" "$@"; } |
		sed -n 's/.*"\(chardev\|blockdev\)":"\([^"]*\)".*/\2/p')
	[ -n "$device" ] && [ -e "/dev/$device" ] || unknown "ndctl made no namespace in $region"
}

# asynchronous REGION: require a region with pmem=off, or of virtio-pmem: only a flush by the
# hypervisor makes its stores persistent.
asynchronous() {
	case $(readlink -f "/sys/bus/nd/devices/$1") in */virtio*) return ;; esac
	[ "$(cat "/sys/bus/nd/devices/$1/deep_flush")" = 1 ] || unknown "$1 is not flushed by a hypervisor"
}

# map_sync FILE SIZE: map a file with MAP_SYNC; $granted is yes or no.
map_sync() {
	need xfs_io
	text=$(xfs_io -c "mmap -rw 0 $2" "$1" 2>&1) || unknown "mmap of $1: $text"
	[ -z "$text" ] || unknown "mmap of $1: $text"
	text=$(xfs_io -c "mmap -rw -S 0 $2" "$1" 2>&1)
	# shellcheck disable=SC2034 # for the scripts
	case $text in
	"") granted=yes ;;
	*"Operation not supported") granted=no ;;
	*) unknown "mmap of $1 with MAP_SYNC: $text" ;;
	esac
}

# dax_file DISK: make an ext4 with DAX on a disk, mount it on /mnt, and make /mnt/file.
dax_file() {
	need mkfs.ext4
	page_kib=$(sed -n 's/^KernelPageSize: *\([0-9]*\) kB/\1/p; T; q' /proc/self/smaps)
	mkfs.ext4 -q -F -b "${page_kib}k" "$1" > /dev/null 2>&1 && mount -o dax=always "$1" /mnt &&
		fallocate -l 2M /mnt/file || unknown "no ext4 with DAX on $1"
}

# xfs_with_dax DISK: make an XFS with DAX on a disk, mount it on /mnt, and make that the current folder;
# $page is the size of its blocks, and of a page.
xfs_with_dax() {
	need mkfs.xfs xfs_io
	page=$(($(sed -n 's/^KernelPageSize: *\([0-9]*\) kB/\1/p; T; q' /proc/self/smaps) * 1024))
	mkfs.xfs -q -f -b size="$page" "$1" && mount -o dax=always "$1" /mnt && cd /mnt ||
		unknown "no XFS with DAX on $1"
}

# breakable REGION|DISK: create a disk that `table error` breaks and `table linear` repairs;
# $disk is its path. All data of the region or disk are lost.
breakable() {
	need dmsetup blockdev
	case $1 in
	/*) below=$1 ;;
	*)
		namespace "$1" fsdax
		below=/dev/$device
		;;
	esac
	sectors=$(blockdev --getsz "$below")
	dmsetup create reproduce --table "0 $sectors linear $below 0" || unknown "no device-mapper device"
	# shellcheck disable=SC2034 # for the scripts
	disk=/dev/$(dmsetup info -c --noheadings -o blkdevname reproduce)
}

# table linear|error: replace the table of the breakable disk.
table() {
	words="0 $sectors $1"
	[ "$1" = error ] || words="$words $below 0"
	dmsetup suspend --noflush --nolockfs reproduce && dmsetup load reproduce --table "$words" &&
		dmsetup resume reproduce || unknown "no table '$words'"
}
