#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# Test MMU notification of RDMA memory regions, on a soft-RoCE device (soft-iWARP
# with UVERBS_DRIVER=siw in the environment), and with a file system on /dev/ram0
# if /dev/ram0 is unused. A few pages are poisoned and unusable until reboot. With
# TEST_POISON_HUGE in the environment, huge pages are also poisoned: a poisoned
# subpage can be reallocated, and kills a process that touches it, so use that only
# if the machine is shut down after the test. The arguments are passed to the
# programs, see -h.

DIR=$(cd "$(dirname "$0")" && pwd)
source "$DIR/../kselftest/ktap_helpers.sh"

PROGS="uverbs_mmu_notify_api uverbs_mmu_notify_changes"
DRIVER="${UVERBS_DRIVER:-rxe}"
NETDEV="mmun$$"
DEV="mmu_notify_$$"
RAMDISK=/dev/ram0
HUGEPAGES=/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages
HUGEPAGES_NEEDED=32
MODS=""
OLD_HUGEPAGES=""
# The programs change these, and restore them unless they are killed.
KNOBS="/proc/sys/kernel/numa_balancing /sys/kernel/mm/ksm/run
	/sys/kernel/debug/sched/numa_balancing/scan_*_ms"
OLD_KNOBS=""
MNT=""
RAMDISK_USED=""

ksft_skip()
{
	ktap_skip_all "$*"
	exit "$KSFT_SKIP"
}

cleanup()
{
	rdma link del "$DEV" 2>/dev/null
	ip link del "$NETDEV" 2>/dev/null
	[ -z "$OLD_HUGEPAGES" ] || echo "$OLD_HUGEPAGES" > "$HUGEPAGES"
	for k in $OLD_KNOBS; do
		echo "${k#*=}" > "${k%%=*}"
	done
	if [ -n "$RAMDISK_USED" ]; then
		if ! mountpoint -q "$MNT" || umount "$MNT"; then
			dd if=/dev/zero of="$RAMDISK" bs=64k count=1 2>/dev/null
		fi
	fi
	[ -z "$MNT" ] || rmdir "$MNT" 2>/dev/null
	for m in $MODS; do
		modprobe -q -r "$m"
	done
}

# Load a module unless it is loaded, and remember to unload it. A missing module
# is not an error: it may be built in.
load()
{
	[ -e "/sys/module/$1" ] && return
	modprobe -q "$1" && [ -e "/sys/module/$1" ] && MODS="$1 $MODS"
}

uverbs_dev()
{
	local f

	f=$(grep -lxF "$DEV" /sys/class/infiniband_verbs/*/ibdev 2>/dev/null) &&
		echo "/dev/infiniband/$(basename "$(dirname "$f")")"
}

# A file system with a page cache of base pages: ext2 on a RAM disk that is unused.
setup_fs()
{
	MNT=$(mktemp -d) || return
	load brd
	blkid -p "$RAMDISK" >/dev/null 2>&1
	# 2: nothing was found. Otherwise the disk may be in use, or there is no blkid.
	if [ $? -eq 2 ] && [ -b "$RAMDISK" ] &&
	   mkfs.ext2 -q "$RAMDISK" >/dev/null 2>&1; then
		RAMDISK_USED=1
		if mount -t ext2 "$RAMDISK" "$MNT" 2>/dev/null; then
			export TEST_DIR="$MNT"
		fi
	fi
}

[ "$(id -u)" -eq 0 ] || ksft_skip "must be run as root"
for cmd in ip rdma; do
	command -v "$cmd" >/dev/null 2>&1 || ksft_skip "missing command: $cmd"
done

trap cleanup EXIT
trap 'exit 1' HUP INT TERM

load ib_uverbs
load dummy
case "$DRIVER" in
rxe) load rdma_rxe ;;
*) load "$DRIVER" ;;
esac
ip link add "$NETDEV" type dummy 2>/dev/null || ksft_skip "no dummy network devices"
ip link set "$NETDEV" up
rdma link add "$DEV" type "$DRIVER" netdev "$NETDEV" 2>/dev/null ||
	ksft_skip "cannot create a $DRIVER device"
for _ in $(seq 50); do
	[ ! -c "$(uverbs_dev)" ] || break
	sleep 0.1
done
UVERBS_DEV="$(uverbs_dev)"
export UVERBS_DEV
[ -c "$UVERBS_DEV" ] || ktap_exit_fail_msg "$DEV has no uverbs device"

setup_fs
for k in $KNOBS; do
	[ ! -w "$k" ] || OLD_KNOBS="$OLD_KNOBS $k=$(cat "$k")"
done
if [ -w "$HUGEPAGES" ]; then
	OLD_HUGEPAGES=$(cat "$HUGEPAGES")
	echo $((OLD_HUGEPAGES + HUGEPAGES_NEEDED)) > "$HUGEPAGES"
fi

ktap_print_header
ktap_set_plan "$(wc -w <<< "$PROGS")"
for prog in $PROGS; do
	"$DIR/$prog" "$@" 2>&1 | sed -u 's/^/  /'
	case ${PIPESTATUS[0]} in
	"$KSFT_PASS") ktap_test_pass "$prog" ;;
	"$KSFT_SKIP") ktap_test_skip "$prog" ;;
	*) ktap_test_fail "$prog" ;;
	esac
done
[ "$KTAP_CNT_SKIP" -lt "$KSFT_NUM_TESTS" ] || exit "$KSFT_SKIP"
ktap_finished
