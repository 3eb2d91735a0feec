# SPDX-License-Identifier: GPL-2.0-or-later
"""Make a snapshot of a booted guest and test it before other guests are restored from it."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from paprscm import log
from paprscm.channel.command import TimedOutError
from paprscm.emulator.binary import Qemu
from paprscm.errors import ConfigError, ContractError, Error, KilledError
from paprscm.guest import tools
from paprscm.guest.equipment import Equipment
from paprscm.guest.guest import Guest
from paprscm.guest.report import ProbeError
from paprscm.guest.snapshot import Snapshot, save_state
from paprscm.host import process
from paprscm.host.cache import Cache, CacheEntry
from paprscm.vm.argv import PORT_NAME, Payload, qemu_argv
from paprscm.vm.machine import Machine, Nvdimm

KIND = "snapshot"
_FORMAT = "3"
"""Version of the way in which this file saves; part of the cache key."""
_KEEP = 6
"""Snapshots to keep (about 100 MB each); every rebuilt kernel adds one."""
_NEEDS_BYTES = 1_500_000_000
_RECORD = "proof.json"

# Time for the end of the connection's process and for deferred work of the guest's kernel, s.
_QUIET_S = 1.0
# Restores to test, by way of saving: if QEMU loses timers, only some of the restores work.
_AS_IT_IS = "as it is"
_PROOFS = {_AS_IT_IS: 3, "secondary CPUs offline": 5}
_CLOCK_LIMIT_S = 5.0
_SLOTS = (1, 4)

# Fills the guest's page cache with the programs that tests run.
_WARM_UP = """
cd /tmp
ndctl list
truncate -s 320M image
mkfs.xfs -q image
mkfs.ext4 -q -F image
rm image
for tool in @PROGRAMS@; do $tool --version < /dev/null > /dev/null 2>&1; done
"""
# Programs of the tests and of guest_tools/pmem.c.
_PROGRAMS = (
    "blkid blockdev busybox cat chmod cksum cp cut dd dmesg dmsetup env fio grep head ln ls mkdir"
    " mktemp mount mv od partx readlink rm sed setsid sort stat strace sync tail taskset tee touch"
    " tr truncate umount wc xfs_io"
)

# Test of a restored guest: CPUs, flushes, clock, random numbers.
_QUERY = """
set -e
for cpu in $(seq 0 $(($(nproc) - 1))); do
	# The CPU's timer must fire.
	taskset -c $cpu sleep 0.01
done
for drc in @DRCS@; do
	for region in /sys/bus/nd/devices/region*; do
		case $(readlink "$region/of_node") in
		*@$drc)
			echo 1 > "$region/deep_flush"
			echo flushed
			;;
		esac
	done
done
echo cpus $(nproc)
echo time $(date +%s)
echo uuid $(cat /proc/sys/kernel/random/uuid)
echo boot_id $(cat /proc/sys/kernel/random/boot_id)
echo urandom $(head -c 16 /dev/urandom | od -An -v -tx1 | tr -d ' ')
"""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Inputs of a snapshot.

    Attributes:
        cache: the cache that keeps it.
        qemu: the QEMU under test.
        equipment: parts of the guest, which has no DIMMs.
    """

    cache: Cache
    qemu: Qemu
    equipment: Equipment

    def fields(self) -> dict[str, str]:
        """Return the cache key: everything that must be equal for QEMU to load the snapshot."""
        payload = self.equipment.payload
        # The paths of the files are irrelevant.
        names = Payload(
            kernel=Path("kernel"),
            disk=Path("disk"),
            initrd=Path("i") if payload.initrd else None,
            words=payload.words,
        )
        board = self.equipment.board
        argv = qemu_argv(("qemu",), Machine(), board, names, {}, None)
        files = [f for f in (payload.kernel, payload.disk, payload.initrd) if f]
        return {
            "qemu": self.qemu.key,
            "version": self.qemu.version_text,
            "machine": f"{board.cpu} {board.accel} {board.firmware}, "
            f"{board.smp} CPUs, {board.memory_mib} MiB",
            "command": _digest("\0".join(argv)),
            "files": _digest("\n".join(map(self.cache.identity, files))),
            "tools": tools.tools_digest("warm", *tools.TOOLS),
            "format": _FORMAT,
        }


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A snapshot, or the reason why there is none.

    Attributes:
        snapshot: the snapshot; None: restored guests do not work.
        reason: the ways of saving that failed, with their errors.
    """

    snapshot: Snapshot | None
    reason: str


def find_snapshot(recipe: Recipe) -> Outcome | None:
    """Return the cached outcome, or None; nothing is made."""
    entry = recipe.cache.find(KIND, recipe.fields())
    return _outcome(entry, recipe) if entry else None


def ensure_snapshot(recipe: Recipe) -> Outcome:
    """Return the snapshot; make and test it if it is not cached.

    The failure of restored guests is cached, too. A timeout in the guest is not: the host may have
    been overloaded, so the next run tries again.

    Raises:
        ConfigError: the kernel does not boot.
        TimedOutError, ProbeError: a command, or gcc, did not end in time in the guest.
    """

    def build(folder: Path) -> None:
        with log.step("making a snapshot of a guest"):
            _build(folder, recipe)

    entry = recipe.cache.ensure(KIND, recipe.fields(), build, needs_bytes=_NEEDS_BYTES, keep=_KEEP)
    return _outcome(entry, recipe)


def _outcome(entry: CacheEntry, recipe: Recipe) -> Outcome:
    record = json.loads((entry.path / _RECORD).read_text())
    how = record["how"]
    snapshot = _snapshot(entry.path, recipe, offline=how != _AS_IT_IS) if how else None
    return Outcome(snapshot=snapshot, reason="; ".join(record["failed"]))


def _snapshot(folder: Path, recipe: Recipe, *, offline: bool) -> Snapshot:
    has_rom = recipe.qemu.has("memory-backend-file", "rom")
    board = recipe.equipment.board
    return Snapshot(folder=folder, board=board, has_rom=has_rom, offline=offline)


def _build(folder: Path, recipe: Recipe) -> None:
    """Try each way of saving, the plain one first, until restored guests pass the test."""
    failed = []
    ways = list(_PROOFS) if recipe.equipment.board.smp > 1 else list(_PROOFS)[:1]
    for how in ways:
        try:
            offline = how != _AS_IT_IS
            _save(folder, recipe, offline=offline)
            with log.step(f"restoring it {_PROOFS[how]} times"):
                _prove(_snapshot(folder, recipe, offline=offline), recipe, _PROOFS[how])
        except (ConfigError, KilledError, TimedOutError, ProbeError):
            # Unrelated to this way of saving, so it is not recorded.
            raise
        except Error as error:
            failed.append(f"saved {how}: {error.message.splitlines()[0]}")
            log.logger.info("%s", failed[-1])
            for file in folder.iterdir():
                file.unlink()
            continue
        (folder / _RECORD).write_text(json.dumps({"how": how, "failed": failed}))
        return
    (folder / _RECORD).write_text(json.dumps({"how": None, "failed": failed}))


def _save(folder: Path, recipe: Recipe, *, offline: bool) -> None:
    """Boot a guest, prepare it, save it."""
    memory = folder / "memory-with-zeros"
    with (
        log.step(f"saving it {'with secondary CPUs offline' if offline else 'as it is'}"),
        tempfile.TemporaryDirectory(prefix="paprscm-save-") as logs,
        Guest(recipe.equipment, Machine(), folder=Path(logs), memory_file=memory) as guest,
    ):
        # Concurrently: the compiler takes most of the time.
        with ThreadPoolExecutor(recipe.equipment.board.smp) as pool:
            binaries = pool.map(
                lambda tool: tools.install_tool(guest, tool), (*tools.TOOLS, "warm")
            )
            helper = list(binaries)[-1]
        if offline:
            guest.succeed("for f in /sys/devices/system/cpu/cpu[1-9]*/online; do echo 0 > $f; done")
        guest.run(
            f"sync; echo 3 > /proc/sys/vm/drop_caches; {_WARM_UP.replace('@PROGRAMS@', _PROGRAMS)}"
        )
        # Fill the page cache with what a connection reads from the disk.
        guest.connect()
        guest.succeed(
            f"cd /sys/class/virtio-ports && for port in *; do "
            f'[ "$(cat $port/name)" != {PORT_NAME} ] || '
            f"exec {helper} /dev/$port $(cat /run/dropbear.pid); done; "
            f"echo 'no virtio-serial port: does the kernel have virtio_console?' >&2; exit 1"
        )
        guest.succeed("kill -STOP $(cat /run/dropbear.pid)")
        guest.disconnect()
        # The kernel's deferred work causes no event.
        time.sleep(_QUIET_S)
        guest.check()
        save_state(guest.qmp, folder / "state")
        shutil.copy(guest.folder / "console.log", folder)
    # Most pages of the guest's memory are zeros.
    process.run(["cp", "--sparse=always", memory, folder / "memory"])
    memory.unlink()


def _prove(snapshot: Snapshot, recipe: Recipe, times: int) -> None:
    """Restore the snapshot `times` times; each guest must run, flush and draw new random numbers.

    Raises:
        Error: a guest fails.
    """
    dimms = tuple(Nvdimm(slot=slot) for slot in _SLOTS)
    machine = Machine(nvdimms=dimms)
    query = _QUERY.replace("@DRCS@", " ".join(f"{dimm.drc:x}" for dimm in dimms))
    seen: set[str] = set()
    for _ in range(times):
        with (
            tempfile.TemporaryDirectory(prefix="paprscm-proof-") as logs,
            Guest(recipe.equipment, machine, folder=Path(logs), snapshot=snapshot) as guest,
        ):
            _check(guest.succeed(query), recipe.equipment.board.smp, seen)


def _check(answer: str, smp: int, seen: set[str]) -> None:
    if answer.count("flushed\n") != len(_SLOTS):
        raise ContractError(
            f"a restored guest did not flush each of {len(_SLOTS)} regions:\n{answer}"
        )
    values = dict(re.findall(r"^([a-z_]+) (\S+)$", answer, re.MULTILINE))
    if values.get("cpus") != str(smp):
        raise ContractError(f"a restored guest has {values.get('cpus')} of {smp} CPUs")
    late_s = time.time() - float(values.get("time", 0))
    if abs(late_s) > _CLOCK_LIMIT_S:
        raise ContractError(f"the clock of a restored guest is {late_s:.0f} s late")
    for name in ("uuid", "boot_id", "urandom"):
        value = values.get(name)
        if value is None or value in seen:
            raise ContractError(f"two restored guests have the same {name}, {value}")
        seen.add(value)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
