# SPDX-License-Identifier: GPL-2.0-or-later
"""Regions by DRC: the parser on output recorded in guests, the tool on a fake sysfs."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
from guest_tool import compile_on_host

from paprscm.channel.command import CommandResult
from paprscm.errors import ContractError, Error, HostError
from paprscm.guest.dimm_content import GuestDimms
from paprscm.guest.guest import Guest
from paprscm.map_sync.verdict import Verdict, judge_map_sync, parse_map_sync
from paprscm.papr import SCM_BLOCK_SIZE, SCM_MIN_LABEL_SIZE, drc_index, node_name
from paprscm.pmem import dump, mounts, namespaces, regions

DATA = Path(__file__).parents[1] / "data"
MIB = 1 << 20


class Recorded:
    """A guest that answers with recorded output of a real one."""

    def __init__(self, stdout: str, status: int = 0, stderr: str = "") -> None:
        self._answer = stdout, status, stderr
        self.dimms = GuestDimms(None, lambda _slot: Path())

    def run(
        self, command: str, *, timeout_s: float | None = None, stdin: bytes = b""
    ) -> CommandResult:
        stdout, status, stderr = self._answer
        return CommandResult(command, status, stdout, stderr, stdout.encode(), 0.0)


def recorded(name: str, status: int = 0) -> Guest:
    return cast(Guest, Recorded((DATA / "pmem" / f"{name}.txt").read_text(), status))


def altered(name: str, pattern: str, replacement: str) -> Guest:
    text, count = re.subn(
        pattern, replacement, (DATA / "pmem" / f"{name}.txt").read_text(), count=1, flags=re.M
    )
    assert count == 1, f"{pattern} is not in {name}"
    return cast(Guest, Recorded(text))


@pytest.mark.parametrize(
    ("name", "slot", "region", "hcall_flush", "deep_flush", "mode"),
    [
        ("pmem-on", 0, "region3", False, "0", 0o444),
        ("pmem-off", 1, "region1", True, "1", 0o644),
        ("plain-nvdimm", 2, "region2", False, "0", 0o444),
        ("pmem-override", 3, "region0", True, "1", 0o644),
        ("hotplugged", 5, "region3", False, "0", 0o444),
    ],
)
def test_recorded_regions(
    name: str, slot: int, region: str, hcall_flush: bool, deep_flush: str, mode: int
) -> None:
    recorded_region = regions.find_region(recorded(name), slot)
    assert (recorded_region.name, recorded_region.slot, recorded_region.drc) == (
        region,
        slot,
        0x90000000 + slot,
    )
    assert (recorded_region.deep_flush, recorded_region.deep_flush_mode) == (deep_flush, mode)
    assert recorded_region.persistence_domain == "memory_controller"
    assert (recorded_region.size_bytes, recorded_region.read_only, recorded_region.nstype) == (
        512 * MIB,
        False,
        5,
    )
    assert recorded_region.align_bytes == 16 * MIB
    assert recorded_region.dimm is not None
    assert recorded_region.dimm.name == region.replace("region", "nmem")
    assert recorded_region.dimm.flags == frozenset({"label"})
    assert recorded_region.dimm.papr_flags == frozenset()
    assert recorded_region.dimm.dirty_shutdown == 0
    node = recorded_region.node
    assert node.path == f"/ibm,persistent-memory/{node_name(slot)}"
    assert node.hcall_flush_required is hcall_flush
    assert node.cache_flush_required is True
    assert node.drc_index == recorded_region.drc
    assert (node.block_size, node.number_of_blocks) == (SCM_BLOCK_SIZE, 2)
    assert node.metadata_size == SCM_MIN_LABEL_SIZE
    assert (node.device_type, node.compatible) == ("ibm,pmemory", ("ibm,pmemory",))
    assert node.application == "operating-system"
    assert re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", node.unit_guid or "")
    assert node.raw["reg"] == recorded_region.drc.to_bytes(4, "big")


def test_recorded_unarmed_region() -> None:
    recorded_region = regions.find_region(recorded("unarmed"), 2)
    assert recorded_region.read_only is True
    assert recorded_region.dimm is not None
    assert recorded_region.dimm.papr_flags == frozenset({"not_armed"})


def test_recorded_missing_region() -> None:
    with pytest.raises(dump.RegionError) as caught:
        regions.find_region(recorded("no-region", 3), 7)
    message = str(caught.value)
    assert "slot 7 (drc 0x90000007)" in message
    for slot, region in enumerate(("region3", "region1", "region2", "region0")):
        assert re.search(f"{region}: node \\S*/ibm,pmemory@9000000{slot},", message)


@pytest.mark.parametrize(
    ("name", "slot", "fstype", "fua", "block_size", "dax"),
    [
        ("dax-mount-xfs", 0, "xfs", "0", 65536, "dax=always"),
        ("dax-mount-ext4", 1, "ext4", "1", 65536, "dax=always"),
        # Also mounted with dax=always: the kernel turns it off without an error.
        ("xfs-4k-blocks", 2, "xfs", "0", 4096, "dax=never"),
    ],
)
def test_recorded_dax_mounts(
    name: str, slot: int, fstype: mounts.FsType, fua: str, block_size: int, dax: str
) -> None:
    mounted = mounts.dax_mount(recorded(name), slot, fstype, "/mnt")
    assert (mounted.page_size, mounted.block_size) == (65536, block_size)
    assert (mounted.device.fua, mounted.device.dax) == (fua, "1")
    assert mounted.device.write_cache == "write back"
    assert mounted.device.region == mounted.region.name
    assert mounted.device.path == mounted.mount.device == f"/dev/{mounted.device.name}"
    assert (mounted.namespace.mode, mounted.namespace.map) == ("fsdax", "dev")
    assert (mounted.device.sector_bytes, mounted.device.read_only) == (512, False)
    assert 500 * MIB < mounted.device.size_bytes < 512 * MIB
    assert mounted.mount.fstype == fstype
    assert dax in mounted.mount.options


def test_recorded_second_mount_of_the_same_file_system() -> None:
    mounted = mounts.dax_mount(recorded("dax-mount-xfs"), 0, "xfs", "/mnt1")
    again = mounts.dax_mount(recorded("dax-mount-reuse"), 0, "xfs", "/mnt1", reuse=True)
    assert again == mounted
    with pytest.raises(ValueError, match="has its block size already"):
        mounts.dax_mount(recorded("dax-mount-reuse"), 0, "xfs", "/m", reuse=True, block_size=4096)


def test_recorded_namespaces() -> None:
    """One namespace of each mode in one region, ordered by number, unlike in ndctl's list."""
    region = regions.find_region(recorded("namespaces"), 3)
    listed = namespaces.find_namespaces(recorded("namespaces"), region)
    rows = [(ns.name, ns.mode, ns.map, ns.path) for ns in listed]
    assert rows == [
        ("namespace0.0", "devdax", "mem", "/dev/dax0.0"),
        ("namespace0.1", "sector", None, "/dev/pmem0.1s"),
        ("namespace0.2", "raw", None, "/dev/pmem0.2"),
        ("namespace0.3", "fsdax", "dev", "/dev/pmem0.3"),
    ]
    assert {ns.region for ns in listed} == {ns.device.region for ns in listed} == {region.name}
    assert len({ns.uuid for ns in listed}) == 4
    devdax, sector, raw, fsdax = listed
    assert isinstance(devdax.device, namespaces.CharacterDevice)
    assert (devdax.device.size_bytes, devdax.device.align_bytes) == (62 * MIB, 2 * MIB)
    assert [ns.disk.dax for ns in (sector, raw, fsdax)] == ["0", "0", "1"]
    assert [ns.disk.sector_bytes for ns in (sector, raw, fsdax)] == [4096, 512, 512]
    assert [ns.disk.size_bytes for ns in (raw, fsdax)] == [64 * MIB, 62 * MIB]
    with pytest.raises(
        ContractError, match=r"namespace0\.0 is devdax: /dev/dax0\.0 is not a block"
    ):
        _ = devdax.disk


def test_recorded_region_without_namespaces() -> None:
    region = regions.find_region(recorded("no-namespaces"), 3)
    assert namespaces.find_namespaces(recorded("no-namespaces"), region) == ()
    assert [ns.mode for ns in namespaces.find_namespaces(recorded("devdax"), region)] == ["devdax"]


def test_the_created_namespace_must_be_the_requested_one() -> None:
    """`ndctl create-namespace` prints the character device in another place than `ndctl list`."""
    region = regions.find_region(recorded("devdax"), 3)
    namespace = namespaces.create_namespace(recorded("devdax"), region, mode="devdax", map="mem")
    assert namespace.path == "/dev/dax0.0"
    with pytest.raises(ContractError, match="requested was devdax, map dev"):
        namespaces.create_namespace(recorded("devdax"), region, mode="devdax", map="dev")
    with pytest.raises(ContractError, match="requested was fsdax"):
        namespaces.create_fsdax(recorded("devdax"), region)


def test_a_region_is_not_taken_for_that_of_another_slot() -> None:
    with pytest.raises(dump.RegionError, match=r"is 0x90000000, not 0x90000001"):
        regions.find_region(recorded("pmem-on"), 1)


LIES: list[tuple[str, str, type[Error], str]] = [
    (r"^text read_only 0$", "text read_only 2", ContractError, "read_only is '2'"),
    (r"^text read_only 0\n", "", ContractError, "no read_only"),
    (r"^text size 536870912$", "text size lots", ContractError, "size is not a number"),
    (r"^text size 536870912$", "text size -1", ContractError, "size is not a number"),
    (r"^file 65536 444 (.*)$", r"file 65536 rw- \1", HostError, "file 65536 rw-"),
    (r"^text nstype 5$", "text size 1", HostError, "text size 1"),
    (r"^done$", "done\ntext more 1", HostError, "after the end"),
    (r"^done\n", "", HostError, "the output ends in step 'find'"),
    (r"^step find$", "Segmentation fault", HostError, "Segmentation fault"),
    (r"^file 8 444 ibm,block-size$", "file 9 444 ibm,block-size", HostError, "of properties"),
    (r"^file 8 444 ibm,block-size$", "file x 444 ibm,block-size", HostError, "file x"),
    (r"^blob props$", "blob other", HostError, "bytes of properties"),
    (r"^ 69 62 6d", " 69 62 6", HostError, "unexpected output"),
]


@pytest.mark.parametrize(("pattern", "replacement", "kind", "message"), LIES)
def test_lies_about_a_region(
    pattern: str, replacement: str, kind: type[Error], message: str
) -> None:
    with pytest.raises(kind, match=re.escape(message)):
        regions.find_region(altered("pmem-on", pattern, replacement), 0)


DISK_LIES = [
    # Another region's disk, and one whose name only has the same prefix.
    ("region3/pfn3.0$", "region0/pfn0.0", "is not below /sys/devices/ndbus3/region3"),
    ("ndbus3/region3/pfn3.0$", "ndbus3/region33/pfn3.0", "is not below"),
    ("ndbus3/region3/pfn3.0$", "ndbus3/region3", "is not below"),
    (r"^text pmem3/device .*\n", "", "no pmem3/device"),
    (r"^text pmem3/ro 0", "text pmem3/ro no", "pmem3/ro is 'no'"),
    (r"^text pmem3/size .*\n", "", "no pmem3/size"),
    # A BTT that ndctl lists as fsdax, and a raw namespace.
    (
        "region3/pfn3.0$",
        "region3/btt3.0",
        "is fsdax according to ndctl, but its pmem3 is on btt3.0",
    ),
    ("region3/pfn3.0$", "region3/namespace3.0", "but its pmem3 is on namespace3.0"),
]

# Unexpected output of ndctl, which is not a result of the kernel.
OTHER_OUTPUT = [
    (r"^ 7b 0a 20", " 7c 0a 20", "ndctl's output for region3 is not as expected"),
    (r"^blob ndctl$", "blob other", "ndctl's output for region3 is not as expected"),
    # "fsdax" becomes "fsdaw", "namespace3" "nam/space3", "pmem3" "p/em3", "dev" "dew".
    (r"66 73 64 61 78", "66 73 64 61 77", "unknown namespace of region3"),
    (r"6e 61 6d 65 73", "6e 61 6d 2f 73", "unknown namespace of region3"),
    (r"70 6d 65 6d 33", "70 2f 65 6d 33", "lists a device 'p/em3'"),
    (r"3a 22 64 65 76 22", "3a 22 64 65 77 22", "page structures of namespace3.0 are in 'dew'"),
]


@pytest.mark.parametrize(("pattern", "replacement", "message"), OTHER_OUTPUT)
def test_output_of_another_ndctl(pattern: str, replacement: str, message: str) -> None:
    with pytest.raises(HostError, match=message):
        mounts.dax_mount(altered("dax-mount-xfs", pattern, replacement), 0, "xfs", "/mnt1")


@pytest.mark.parametrize(("pattern", "replacement", "message"), DISK_LIES)
def test_lies_about_a_disk(pattern: str, replacement: str, message: str) -> None:
    with pytest.raises(ContractError, match=message):
        mounts.dax_mount(altered("dax-mount-xfs", pattern, replacement), 0, "xfs", "/mnt1")


def test_a_failed_step_is_named() -> None:
    text = (DATA / "pmem" / "dax-mount-xfs.txt").read_text().partition("step mount")[0]
    guest = cast(Guest, Recorded(text, 1, "mkfs.xfs: no space\n"))
    with pytest.raises(ContractError, match=r"step 'filesystem' ended with status 1:\nmkfs\.xfs"):
        mounts.dax_mount(guest, 0, "xfs", "/mnt1")


@pytest.mark.parametrize(
    ("name", "verdict"),
    [
        ("xfs-pmem-on", Verdict.ACCEPTED),
        ("ext4-plain-nvdimm", Verdict.ACCEPTED),
        ("ext4-pmem-off", Verdict.REFUSED),
        ("xfs-pmem-override", Verdict.REFUSED),
        ("xfs-4k-blocks", Verdict.NOT_DAX),
        ("tmpfs", Verdict.NOT_DAX),
    ],
)
def test_recorded_map_sync_reports(name: str, verdict: Verdict) -> None:
    text = (DATA / "map_sync" / f"{name}.json").read_text()
    status = 0 if verdict is Verdict.ACCEPTED else 1
    assert judge_map_sync(parse_map_sync(text, status)).verdict is verdict


class FakeSysfs:
    """The parts of a guest's sysfs that guest_tools/pmem.c needs, and a guest in which it runs."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.bin = root / "bin"
        self.path = f"{self.bin}:{os.environ['PATH']}"
        self.settings = [f"sysfs={root}"]
        self.dimms = GuestDimms(None, lambda _slot: Path())
        # Of the stand-in of mount(2).
        self.errno = 0
        self.message = ""
        for folder in ("bus/nd/devices", "block", "devices", "bin"):
            (root / folder).mkdir(parents=True)

    def add(self, number: int, drc: int, *, of_node: bool = True, driver: bool = True) -> Path:
        parent = "ibm,persistent-memory"
        name = f"ibm,pmemory@{drc:x}"
        node = self.root / "firmware/devicetree/base" / parent / name
        node.mkdir(parents=True, exist_ok=True)
        (node / "ibm,my-drc-index").write_bytes((drc & 0xFFFFFFFF).to_bytes(4, "big"))
        (node / "ibm,cache-flush-required").touch()
        (node / "ibm,unit-guid").write_bytes(b"a" * 300 + b"\0")
        bus = self.root / f"devices/ndbus{number}"
        device = bus / f"region{number}"
        device.mkdir(parents=True)
        (bus / "provider").write_text(f"{parent}:{name}\n")
        for key, value in {"size": "268435456", "read_only": "0", "nstype": "5"}.items():
            (device / key).write_text(f"{value}\n")
        if of_node:
            (device / "of_node").symlink_to(node)
        if driver:
            (device / "driver").symlink_to(self.root)
        (self.root / f"bus/nd/devices/region{number}").symlink_to(device)
        return device

    def add_disk(self, name: str, parent: Path) -> None:
        """Add a disk below a namespace device, with the kernel's layout."""
        (parent / "block" / name / "queue").mkdir(parents=True)
        for key, value in {"ro": 0, "size": 2048, "queue/logical_block_size": 512}.items():
            (parent / "block" / name / key).write_text(f"{value}\n")
        (parent / "block" / name / "device").symlink_to(parent)
        (self.root / "block" / name).symlink_to(parent / "block" / name)

    def tool(self, name: str, text: str) -> None:
        (self.bin / name).write_text(f"#!/bin/sh\n{text}\n")
        (self.bin / name).chmod(0o755)

    def run_tool(self, tool: Path, words: Sequence[str]) -> CommandResult:
        command = [str(tool), *self.settings, *words]
        done = subprocess.run(
            command,
            capture_output=True,
            env={
                "PATH": self.path,
                "LOG": str(self.root / "log"),
                "KMSG": str(self.root / "kmsg"),
                "MESSAGE": self.message,
                "ERRNO": str(self.errno),
            },
            timeout=30,
            check=False,
        )
        out, err = done.stdout.decode(), done.stderr.decode()
        return CommandResult(shlex.join(command), done.returncode, out, err, done.stdout, 0.0)


_MOUNT = """#include <sys/mount.h>
static int stand_in(const char *disk, const char *folder, const char *type, unsigned long flags,
	const void *data)
{
	FILE *log = fopen(getenv("LOG"), "a"), *kmsg = fopen(getenv("KMSG"), "a");

	fprintf(log, "mount %s %s %s %lu %s\\n", disk, folder, type, flags, (const char *)data);
	fputs(getenv("MESSAGE"), kmsg);
	fclose(log);
	fclose(kmsg);
	errno = atoi(getenv("ERRNO"));
	return errno ? -1 : 0;
}
#define mount stand_in
"""


@pytest.fixture(scope="session")
def tool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """guest_tools/pmem.c on this host, with a stand-in of mount(2)."""

    def change(source: str) -> str:
        source, count = re.subn("#include <sys/mount.h>\n", lambda _: _MOUNT, source)
        assert (count, source.count('"/dev/kmsg"')) == (1, 3)
        return source.replace('"/dev/kmsg"', 'getenv("KMSG")')

    return compile_on_host("pmem", tmp_path_factory.mktemp("tool") / "pmem", change=change)


@pytest.fixture
def sysfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tool: Path) -> FakeSysfs:
    fake = FakeSysfs(tmp_path / "sys")
    (fake.root / "kmsg").write_text("6,1,0,-;of before\n")

    def run_tool(
        guest: Guest, name: str, words: Sequence[str], *, timeout_s: float
    ) -> CommandResult:
        return fake.run_tool(tool, words)

    monkeypatch.setattr(dump, "run_tool", run_tool)
    return fake


@pytest.mark.parametrize("of_node", [True, False])
def test_found_by_drc_not_by_index(sysfs: FakeSysfs, of_node: bool) -> None:
    for number, slot in enumerate((3, 1, 2, 0, 16)):
        sysfs.add(number, drc_index(slot), of_node=of_node)
    for number, slot in enumerate((3, 1, 2, 0, 16)):
        region = regions.find_region(cast(Guest, sysfs), slot)
        assert region.name == f"region{number}"
        assert region.node.drc_index == drc_index(slot)
        assert region.node.unit_guid == "a" * 300
        assert (region.deep_flush, region.deep_flush_mode, region.dimm) == (None, None, None)


def test_a_longer_index_is_another_one(sysfs: FakeSysfs) -> None:
    sysfs.add(0, 0x900000010)
    with pytest.raises(dump.RegionError, match=r"there are: \n  region0: node \S+@900000010,"):
        regions.find_region(cast(Guest, sysfs), 1)


def test_no_region_at_all(sysfs: FakeSysfs) -> None:
    with pytest.raises(dump.RegionError, match="there are: none"):
        regions.find_region(cast(Guest, sysfs), 0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("ibm,my-drc-index", b"\x90\0\0\1", "ibm,my-drc-index is 0x90000001, not 0x90000000"),
        ("ibm,my-drc-index", None, "ibm,my-drc-index is none"),
        ("ibm,my-drc-index", bytes(8), "not a number of 4 bytes"),
        ("ibm,block-size", b"\x10\0\0\0", "ibm,block-size is 10 00 00 00, not a number of 8"),
        ("ibm,number-of-blocks", b"", "ibm,number-of-blocks is empty"),
        ("ibm,metadata-size", bytes(8), "not a number of 4 bytes"),
        ("ibm,unit-guid", b"no end", "not text that ends with a zero byte"),
        ("ibm,unit-guid", b"one\0two\0", "not one string"),
        ("ibm,unit-guid", b"\xff\0", "not text"),
        ("compatible", b"\0", "not text"),
        ("device_type", b"", "device_type is empty, not text"),
        ("ibm,hcall-flush-required", b"\0", "ibm,hcall-flush-required is 00, not empty"),
        ("ibm,cache-flush-required", b"\1", "ibm,cache-flush-required is 01, not empty"),
    ],
)
def test_a_property_of_another_form(
    sysfs: FakeSysfs, name: str, content: bytes | None, message: str
) -> None:
    file = sysfs.add(0, drc_index(0)) / "of_node" / name
    assert regions.find_region(cast(Guest, sysfs), 0).name == "region0"
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content)
    with pytest.raises(ContractError, match=message):
        regions.find_region(cast(Guest, sysfs), 0)


def test_two_regions_of_one_drc(sysfs: FakeSysfs) -> None:
    sysfs.add(0, drc_index(0))
    sysfs.add(1, drc_index(0))
    with pytest.raises(dump.RegionError, match="both region0 and region1 are of drc 90000000"):
        regions.find_region(cast(Guest, sysfs), 0)


def test_region_without_driver(sysfs: FakeSysfs) -> None:
    sysfs.add(0, drc_index(0), driver=False)
    with pytest.raises(dump.RegionError, match="region0 has no driver"):
        regions.find_region(cast(Guest, sysfs), 0)


def test_waits_for_a_region(sysfs: FakeSysfs) -> None:
    timer = threading.Timer(0.5, sysfs.add, (7, drc_index(4)))
    timer.start()
    started = time.monotonic()
    try:
        assert regions.wait_for_region(cast(Guest, sysfs), 4, 10).name == "region7"
    finally:
        timer.join()
    assert 0.4 < time.monotonic() - started < 5


def test_waiting_ends(sysfs: FakeSysfs) -> None:
    started = time.monotonic()
    with pytest.raises(dump.RegionError, match="within 1 s"):
        regions.wait_for_region(cast(Guest, sysfs), 4, 1)
    assert 1 <= time.monotonic() - started < 5


_UUID = "70d12804-2f79-4e62-ba86-156a743cb6f0"
_MADE = {"dev": "namespace0.0", "mode": "fsdax", "map": "dev", "uuid": "u", "blockdev": "pmem9"}


def _with_tools(sysfs: FakeSysfs, made_on: Callable[[Path], Path], *listed: dict[str, str]) -> Path:
    """Create stand-ins that log their arguments; ndctl prints the `listed` namespaces."""
    device = sysfs.add(0, drc_index(0))
    log = sysfs.root / "log"
    for name in ("mkfs.xfs", "mkfs.ext4", "ndctl"):
        version = '[ "$1" != -V ] || { echo mkfs.xfs version 1.0.0; exit; }; '
        sysfs.tool(name, f'{version}echo "{name} $*" >> {log}')
    entries = listed or (_MADE,)
    for number, entry in enumerate(entries):
        parent = made_on(device).with_name(f"pfn0.{number}")
        sysfs.add_disk(entry["blockdev"], parent)
        for key, value in {"namespace": entry["dev"], "mode": "pmem", "uuid": _UUID}.items():
            (parent / key).write_text(f"{value}\n")
    # One key per line, as in ndctl's output.
    text = json.dumps(entries if len(entries) > 1 else entries[0], indent=1, separators=(",", ":"))
    (sysfs.root / "said").write_text(text)
    sysfs.tool("ndctl", f'echo "ndctl $*" >> {log}; cat {sysfs.root}/said')
    return log


def test_namespace_must_be_on_the_region(sysfs: FakeSysfs) -> None:
    log = _with_tools(sysfs, lambda device: device / "pfn0.0")
    guest = cast(Guest, sysfs)
    disk = namespaces.create_fsdax(guest, regions.find_region(guest, 0))
    assert (disk.name, disk.path, disk.region) == ("pmem9", "/dev/pmem9", "region0")
    assert disk.size_bytes == MIB
    assert log.read_text() == "ndctl create-namespace -f -r region0 -m fsdax\n"


def test_options_of_a_namespace(sysfs: FakeSysfs) -> None:
    log = _with_tools(sysfs, lambda device: device / "pfn0.0", {**_MADE, "map": "mem"})
    guest = cast(Guest, sysfs)
    options = {"map": "mem", "size_bytes": 64 * MIB, "align_bytes": 65536}
    namespaces.create_namespace(guest, regions.find_region(guest, 0), mode="fsdax", **options)  # type: ignore[arg-type]
    assert log.read_text() == (
        "ndctl create-namespace -f -r region0 -m fsdax -M mem -s 67108864 -a 65536\n"
    )


def test_a_device_that_sysfs_does_not_have(sysfs: FakeSysfs) -> None:
    _with_tools(sysfs, lambda device: device / "pfn0.0")
    (sysfs.root / "block/pmem9").unlink()
    guest = cast(Guest, sysfs)
    with pytest.raises(ContractError, match="sysfs has no pmem9"):
        namespaces.create_fsdax(guest, regions.find_region(guest, 0))


def test_reuse_creates_nothing(sysfs: FakeSysfs) -> None:
    log = _with_tools(sysfs, lambda device: device / "pfn0.0")
    with pytest.raises(ContractError, match=r"step 'mount'(.|\n)*not in /proc/self/mounts"):
        mounts.dax_mount(cast(Guest, sysfs), 0, "ext4", str(sysfs.root), reuse=True)
    assert log.read_text() == f"mount /dev/pmem9 {sysfs.root} ext4 0 dax=always\n"


@pytest.mark.parametrize("count", [0, 2])
def test_reuse_requires_one_namespace(sysfs: FakeSysfs, count: int) -> None:
    second = {**_MADE, "dev": "namespace0.1", "blockdev": "pmem9.1"}
    log = _with_tools(sysfs, lambda device: device / "pfn0.0", _MADE, second)
    if not count:
        for parent in (sysfs.root / "devices/ndbus0/region0").glob("pfn*"):
            shutil.rmtree(parent)
    with pytest.raises(ContractError, match=f"region0 has {count} fsdax namespaces, not one"):
        mounts.dax_mount(cast(Guest, sysfs), 0, "xfs", "/mnt1", reuse=True)
    assert not log.exists()


def test_a_namespace_that_the_dimm_holds_is_not_created(
    sysfs: FakeSysfs, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = _with_tools(sysfs, lambda device: device / "pfn0.0")
    guest = cast(Guest, sysfs)
    region = regions.find_region(guest, 0)
    asked: list[tuple[int, str]] = []

    def take(slot: int, holds: str) -> bool:
        asked.append((slot, holds))
        return len(asked) == 1

    monkeypatch.setattr(sysfs.dimms, "take", take)
    held = namespaces.create_namespace(guest, region, mode="fsdax")
    assert (held.path, held.uuid) == ("/dev/pmem9", _UUID)
    assert not log.exists()
    # A part of the region is never held.
    namespaces.create_namespace(guest, region, mode="fsdax", size_bytes=64 * MIB)
    assert log.read_text() == "ndctl create-namespace -f -r region0 -m fsdax -s 67108864\n"
    assert asked == [(0, "fsdax")]


@pytest.mark.parametrize(
    ("mode", "owner", "map_"),
    [
        ("raw", "namespace0.0", None),
        ("sector", "btt0.0", None),
        ("fsdax", "pfn0.0", "dev"),
        ("devdax", "dax0.0", "dev"),
    ],
)
def test_a_namespace_that_is_there(
    sysfs: FakeSysfs, mode: Any, owner: str, map_: str | None
) -> None:
    device = sysfs.add(0, drc_index(0))
    # The seeds of other modes are there, too.
    for name in {"namespace0.0", "btt0.0", "pfn0.0", "dax0.0", "dax0.1"}:
        (device / name).mkdir()
    parent = device / owner
    if mode == "devdax":
        disk = parent / "dax0.0"
        (parent / "dax_region").mkdir()
        disk.mkdir()
        for key in ("size", "align"):
            (disk / key).write_text("4096\n")
        (sysfs.root / "bus/dax/devices").mkdir(parents=True)
        (sysfs.root / "bus/dax/devices/dax0.0").symlink_to(disk)
    else:
        sysfs.add_disk("pmem0", parent)
    facts = {"uuid": _UUID} | ({"namespace": "namespace0.0"} if mode != "raw" else {})
    facts |= {"mode": "pmem"} if map_ else {}
    for key, value in facts.items():
        (parent / key).write_text(f"{value}\n")
    found = namespaces.find_namespace(cast(Guest, sysfs), 0, mode)
    assert (found.name, found.mode, found.map, found.uuid) == ("namespace0.0", mode, map_, _UUID)
    assert found.path == ("/dev/dax0.0" if mode == "devdax" else "/dev/pmem0")
    for other in {"raw", "sector", "fsdax", "devdax"} - {mode}:
        with pytest.raises(ContractError, match=f"region0 has 0 {other} namespaces, not one"):
            namespaces.find_namespace(cast(Guest, sysfs), 0, cast(Any, other))


def test_no_file_system_on_another_regions_disk(sysfs: FakeSysfs) -> None:
    log = _with_tools(sysfs, lambda device: device.with_name("region01") / "pfn0.0")
    with pytest.raises(ContractError, match=r"step 'namespace'(.|\n)*which is not below"):
        mounts.dax_mount(cast(Guest, sysfs), 0, "xfs", "/mnt1")
    assert log.read_text() == "ndctl create-namespace -f -r region0 -m fsdax\n"


def test_commands_of_a_dax_mount(sysfs: FakeSysfs, tmp_path: Path) -> None:
    log = _with_tools(sysfs, lambda device: device / "pfn0.0")
    target = tmp_path / "mnt with space"
    # mount(2) is a stand-in here, so the step must find that nothing is mounted.
    with pytest.raises(ContractError, match=r"step 'mount'(.|\n)*not in /proc/self/mounts"):
        mounts.dax_mount(cast(Guest, sysfs), 0, "xfs", str(target), options="dax=always,ro")
    page = os.sysconf("SC_PAGESIZE")
    assert log.read_text().splitlines()[1:] == [
        f"mkfs.xfs -q -f -b size={page} /dev/pmem9",
        f"mount /dev/pmem9 {target} xfs 1 dax=always",
    ]


def test_a_refused_mount(sysfs: FakeSysfs, tmp_path: Path) -> None:
    """Only new messages count, with a line for each of their lines."""
    sysfs.errno = errno.EINVAL
    sysfs.message = (
        "3,2,5,-;one: 90%\\x0a\\x09two \\x5c and \\xc3\\xa9\n SUBSYSTEM=block\n DEVICE=b8:0\n"
    )
    answer = mounts.try_mount(cast(Guest, sysfs), "/dev/pmem0", "ext4", str(tmp_path / "m"))
    assert answer == mounts.MountAnswer(
        errno_name="EINVAL", messages=("one: 90%", "\ttwo \\ and é")
    )
    assert (sysfs.root / "log").read_text() == f"mount /dev/pmem0 {tmp_path}/m ext4 0 dax=always\n"


@pytest.mark.parametrize(
    ("options", "flags", "data"),
    [
        ("", 0, ""),
        ("ro", 1, ""),
        ("remount,rw,dax=always", 32, "dax=always"),
        ("dax=never,noatime,usrquota,nosuid,nodev,noexec,sync", 0x41E, "dax=never,usrquota"),
    ],
)
def test_mount_options(
    sysfs: FakeSysfs, tmp_path: Path, options: str, flags: int, data: str
) -> None:
    """The flags are those of linux/mount.h; the file system gets the rest."""
    target = f"{tmp_path}/a/b"
    guest = cast(Guest, sysfs)
    answer = mounts.try_mount(guest, "/dev/pmem0", "xfs", target, options=options)
    assert answer == mounts.MountAnswer(errno_name=None, messages=())
    assert (sysfs.root / "log").read_text() == f"mount /dev/pmem0 {target} xfs {flags} {data}\n"


def test_a_mount_that_fails(sysfs: FakeSysfs, tmp_path: Path) -> None:
    sysfs.errno = errno.EACCES
    with pytest.raises(ContractError, match=r"step 'mount'(.|\n)*mount /dev/pmem0: 13 EACCES"):
        mounts.mount(cast(Guest, sysfs), "/dev/pmem0", "xfs", str(tmp_path / "m"))


def _disk(sysfs: FakeSysfs) -> namespaces.BlockDevice:
    return namespaces.BlockDevice(
        name="pmem9",
        # A file instead of the device.
        path=str(sysfs.root / "pmem9"),
        region="region0",
        size_bytes=64 * MIB,
        sector_bytes=512,
        read_only=False,
        fua=None,
        dax=None,
        write_cache=None,
    )


def _with_partitions(sysfs: FakeSysfs, *made: tuple[int, int]) -> None:
    """Create a disk, and a partx that makes these partitions, in sectors."""
    (sysfs.root / "pmem9").touch()
    for number, (start, size) in enumerate(made, 1):
        folder = sysfs.root / f"block/pmem9/pmem9p{number}"
        folder.mkdir(parents=True)
        (folder / "start").write_text(f"{start}\n")
        (folder / "size").write_text(f"{size}\n")
    sysfs.tool("partx", f'echo "$*" > {sysfs.root}/log')


def test_partitions(sysfs: FakeSysfs) -> None:
    """The table has the MBR's format, checked here by its offsets."""
    _with_partitions(sysfs, (2048, 65536), (131073, 16))
    disk = _disk(sysfs)
    ranges = [(MIB, 32 * MIB), (64 * MIB + 512, 8192)]
    assert namespaces.partition(cast(Guest, sysfs), disk, ranges) == [
        "/dev/pmem9p1",
        "/dev/pmem9p2",
    ]
    assert (sysfs.root / "log").read_text() == f"--add {disk.path}\n"
    table = Path(disk.path).read_bytes()
    assert (len(table), table[:446], table[510:]) == (512, bytes(446), b"\x55\xaa")
    entries = [table[at : at + 16] for at in range(446, 510, 16)]
    rows = [(e[4], *(int.from_bytes(e[at : at + 4], "little") for at in (8, 12))) for e in entries]
    assert rows == [(0x83, 2048, 65536), (0x83, 131073, 16), (0, 0, 0), (0, 0, 0)]


@pytest.mark.parametrize("made", [[], [(2048, 65535)], [(2048, 65536), (1, 1)]])
def test_other_partitions_than_asked_for(sysfs: FakeSysfs, made: list[tuple[int, int]]) -> None:
    _with_partitions(sysfs, *made)
    with pytest.raises(ContractError, match="pmem9 has the partitions"):
        namespaces.partition(cast(Guest, sysfs), _disk(sysfs), [(MIB, 32 * MIB)])


@pytest.mark.parametrize("ranges", [[(100, 512)], [(512, 100)], [(512, 512)] * 5])
def test_partitions_that_no_mbr_can_hold(sysfs: FakeSysfs, ranges: list[tuple[int, int]]) -> None:
    with pytest.raises(ValueError, match="MBR"):
        namespaces.partition(cast(Guest, sysfs), _disk(sysfs), ranges)


@pytest.mark.parametrize(("text", "size"), [("KernelPageSize:       64 kB", 65536), ("x", None)])
def test_page_size(text: str, size: int | None) -> None:
    class Answers:
        def succeed(self, command: str) -> str:
            return text

    if size is None:
        with pytest.raises(ContractError, match="smaps has 'x'"):
            regions.read_page_size(cast(Guest, Answers()))
    else:
        assert regions.read_page_size(cast(Guest, Answers())) == size


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (127, "a program is missing in the guest's userland"),
        (126, "a program cannot be executed in the guest's userland"),
        (139, "a program in the guest crashed, SIGSEGV"),
        (132, "a program in the guest crashed, SIGILL"),
    ],
)
def test_a_tool_that_could_not_report(sysfs: FakeSysfs, status: int, message: str) -> None:
    _with_tools(sysfs, lambda device: device / "pfn0.0")
    sysfs.tool("mkfs.ext4", f"echo it said so >&2; exit {status}")
    with pytest.raises(HostError, match=f"step 'filesystem': {message}:\nit said so"):
        mounts.make_filesystem(cast(Guest, sysfs), "/dev/pmem9", "ext4", 4096)


@pytest.mark.parametrize(("exists", "fate"), [(False, "is missing"), (True, "cannot be executed")])
def test_a_program_that_does_not_start(sysfs: FakeSysfs, exists: bool, fate: str) -> None:
    sysfs.path = str(sysfs.bin)
    if exists:
        (sysfs.bin / "mkfs.ext4").touch(mode=0o644)
    with pytest.raises(HostError, match=f"step 'filesystem': a program {fate} in the guest"):
        mounts.make_filesystem(cast(Guest, sysfs), "/dev/pmem9", "ext4", 4096)


def test_output_that_is_cut() -> None:
    text = (DATA / "pmem" / "dax-mount-xfs.txt").read_text().partition("step mount")[0]
    guest = cast(Guest, Recorded(text, 0, ""))
    with pytest.raises(HostError, match="the output ends in step 'filesystem'"):
        mounts.dax_mount(guest, 0, "xfs", "/mnt1")


@pytest.mark.parametrize(
    ("version", "configs", "features"),
    [
        # The file of the newest kernel that is not newer than the running one.
        ("999.1.0", ("0.9", "1.2", "2.5", "2.10", "998.0"), "lts_2.10.conf"),
        ("999.1.0", ("998.0",), None),
        ("999.1.0", (), None),
        # mkfs.xfs is not newer than this kernel.
        ("0.9.0", ("0.9", "1.2"), None),
    ],
)
def test_mkfs_features_of_the_kernel(
    sysfs: FakeSysfs,
    tmp_path: Path,
    version: str,
    configs: tuple[str, ...],
    features: str | None,
) -> None:
    log = _with_tools(sysfs, lambda device: device / "pfn0.0")
    sysfs.tool(
        "mkfs.xfs",
        f'[ "$1" != -V ] || {{ echo mkfs.xfs version {version}; exit; }}; echo "$*" >> {log}',
    )
    folder = tmp_path / "mkfs"
    folder.mkdir()
    for name in configs:
        (folder / f"lts_{name}.conf").touch()
    sysfs.settings.append(f"mkfs_configs={folder}")
    mounts.make_filesystem(cast(Guest, sysfs), "/dev/pmem9", "xfs", 4096)
    chosen = f"-c options={folder}/{features} " if features else ""
    assert log.read_text() == f"-q -f {chosen}-b size=4096 /dev/pmem9\n"


def test_make_filesystem_alone(sysfs: FakeSysfs) -> None:
    log = _with_tools(sysfs, lambda device: device / "pfn0.0")
    mounts.make_filesystem(cast(Guest, sysfs), "/dev/pmem9", "ext4", 4096)
    assert re.fullmatch(r"mkfs\.ext4 .*-b 4096 .*/dev/pmem9\n", log.read_text())
    sysfs.tool("mkfs.ext4", "echo 'no such device' >&2; exit 7")
    with pytest.raises(ContractError, match=r"status 7:\nno such device"):
        mounts.make_filesystem(cast(Guest, sysfs), "/dev/pmem9", "ext4", 4096)


def test_status_3_of_mkfs_is_not_a_missing_region(sysfs: FakeSysfs) -> None:
    """Status 3 means "no region" only in the step "find"."""
    _with_tools(sysfs, lambda device: device / "pfn0.0")
    sysfs.tool("mkfs.xfs", "exit 3")
    with pytest.raises(ContractError, match="step 'filesystem' ended with status 3") as caught:
        mounts.dax_mount(cast(Guest, sysfs), 0, "xfs", "/mnt1")
    assert not isinstance(caught.value, dump.RegionError)


def test_slots_out_of_range() -> None:
    for slot in (-1, 32):
        with pytest.raises(ValueError, match=f"slot {slot} "):
            regions.find_region(recorded("pmem-on"), slot)
