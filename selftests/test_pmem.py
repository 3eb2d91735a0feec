# SPDX-License-Identifier: GPL-2.0-or-later
"""Regions by DRC: the parser on output recorded in guests, the script on a sysfs made by hand."""

from __future__ import annotations

import os
import re
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest

from paprscm import pmem
from paprscm.errors import ContractError, Error, HostError
from paprscm.guest import Guest
from paprscm.map_sync_report import Verdict, judge, parse_map_sync
from paprscm.papr import SCM_BLOCK_SIZE, SCM_MIN_LABEL_SIZE, drc_index, node_name
from paprscm.pmem_script import script
from paprscm.ssh import CommandResult

DATA = Path(__file__).parent / "data"
MIB = 1 << 20


class Recorded:
    """A guest that answers with what a real one once answered."""

    def __init__(self, stdout: str, status: int = 0, stderr: str = "") -> None:
        self._answer = stdout, status, stderr

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
    found = pmem.region(recorded(name), slot)
    assert (found.name, found.slot, found.drc) == (region, slot, 0x90000000 + slot)
    assert (found.deep_flush, found.deep_flush_mode) == (deep_flush, mode)
    assert found.persistence_domain == "memory_controller"
    assert (found.size_bytes, found.read_only, found.nstype) == (512 * MIB, False, 5)
    assert found.align_bytes == 16 * MIB
    assert found.dimm is not None
    assert found.dimm.name == region.replace("region", "nmem")
    assert found.dimm.flags == frozenset({"label"})
    assert found.dimm.papr_flags == frozenset()
    assert found.dimm.dirty_shutdown == 0
    node = found.node
    assert node.path == f"/ibm,persistent-memory/{node_name(slot)}"
    assert node.hcall_flush_required is hcall_flush
    assert node.cache_flush_required is True
    assert node.drc_index == found.drc
    assert (node.block_size, node.number_of_blocks) == (SCM_BLOCK_SIZE, 2)
    assert node.metadata_size == SCM_MIN_LABEL_SIZE
    assert (node.device_type, node.compatible) == ("ibm,pmemory", ("ibm,pmemory",))
    assert node.application == "operating-system"
    assert re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", node.unit_guid or "")
    assert node.raw["reg"] == found.drc.to_bytes(4, "big")


def test_recorded_unarmed_region() -> None:
    found = pmem.region(recorded("unarmed"), 2)
    assert found.read_only is True
    assert found.dimm is not None
    assert found.dimm.papr_flags == frozenset({"not_armed"})


def test_recorded_missing_region() -> None:
    with pytest.raises(pmem.RegionError) as caught:
        pmem.region(recorded("no-region", 3), 7)
    message = str(caught.value)
    assert "slot 7 (drc 0x90000007)" in message
    for slot, region in enumerate(("region3", "region1", "region2", "region0")):
        assert re.search(f"{region}: node \\S*/ibm,pmemory@9000000{slot},", message)


@pytest.mark.parametrize(
    ("name", "slot", "fstype", "fua", "block_size", "dax"),
    [
        ("dax-mount-xfs", 0, "xfs", "0", 65536, "dax=always"),
        ("dax-mount-ext4", 1, "ext4", "1", 65536, "dax=always"),
        # Asked for dax=always as well: the kernel turns it off without an error.
        ("xfs-4k-blocks", 0, "xfs", "0", 4096, "dax=never"),
    ],
)
def test_recorded_dax_mounts(
    name: str, slot: int, fstype: pmem.FsType, fua: str, block_size: int, dax: str
) -> None:
    made = pmem.dax_mount(recorded(name), slot, fstype, "/mnt")
    assert (made.page_size, made.block_size) == (65536, block_size)
    assert (made.device.fua, made.device.dax) == (fua, "1")
    assert made.device.write_cache == "write back"
    assert made.device.region == made.region.name
    assert made.device.path == made.mount.device == f"/dev/{made.device.name}"
    assert made.device.mode == "fsdax"
    assert 500 * MIB < made.device.size_bytes < 512 * MIB
    assert made.mount.fstype == fstype
    assert dax in made.mount.options


def test_a_region_is_not_taken_for_that_of_another_slot() -> None:
    with pytest.raises(pmem.RegionError, match=r"is 0x90000000, not 0x90000001"):
        pmem.region(recorded("pmem-on"), 1)


LIES: list[tuple[str, str, type[Error], str]] = [
    (r"^text read_only 0$", "text read_only 2", ContractError, "read_only is '2'"),
    (r"^text read_only 0\n", "", ContractError, "no read_only"),
    (r"^text size 536870912$", "text size lots", ContractError, "size is no number"),
    (r"^text size 536870912$", "text size -1", ContractError, "size is no number"),
    (r"^text deep_flush_mode 444$", "text deep_flush_mode rw-", HostError, "deep_flush is 'rw-'"),
    (r"^text nstype 5$", "text size 1", HostError, "text size 1"),
    (r"^done$", "done\ntext more 1", HostError, "after the end"),
    (r"^done\n", "", ContractError, "step 'find' ended"),
    (r"^step find$", "Segmentation fault", HostError, "Segmentation fault"),
    (r"^prop 8 ibm,block-size$", "prop 9 ibm,block-size", HostError, "bytes of properties"),
    (r"^prop 8 ibm,block-size$", "prop x ibm,block-size", HostError, "prop x"),
    (r"^blob props$", "blob other", HostError, "bytes of properties"),
    (r"^ 69 62 6d", " 69 62 6", HostError, "should not"),
]


@pytest.mark.parametrize(("pattern", "replacement", "kind", "message"), LIES)
def test_lies_about_a_region(
    pattern: str, replacement: str, kind: type[Error], message: str
) -> None:
    with pytest.raises(kind, match=re.escape(message)):
        pmem.region(altered("pmem-on", pattern, replacement), 0)


DISK_LIES = [
    # Another region's disk, and one whose name merely begins like ours.
    ("region3/pfn3.0$", "region0/pfn0.0", "is not below /sys/devices/ndbus3/region3"),
    ("ndbus3/region3/pfn3.0$", "ndbus3/region33/pfn3.0", "is not below"),
    (r"^text disk_device .*\n", "", "no disk_device"),
    (r"^ 7b 0a 20", " 7c 0a 20", "printed"),
    (r"^blob ndctl$", "blob other", "printed"),
    # "fsdax" becomes "fsdaw".
    (r"66 73 64 61 78", "66 73 64 61 77", "made no fsdax namespace"),
]


@pytest.mark.parametrize(("pattern", "replacement", "message"), DISK_LIES)
def test_lies_about_a_disk(pattern: str, replacement: str, message: str) -> None:
    with pytest.raises(ContractError, match=message):
        pmem.dax_mount(altered("dax-mount-xfs", pattern, replacement), 0, "xfs", "/mnt1")


def test_a_failed_step_is_named() -> None:
    text = (DATA / "pmem" / "dax-mount-xfs.txt").read_text().partition("text page_size")[0]
    guest = cast(Guest, Recorded(text, 1, "mkfs.xfs: no space\n"))
    with pytest.raises(ContractError, match=r"step 'filesystem' ended with status 1:\nmkfs\.xfs"):
        pmem.dax_mount(guest, 0, "xfs", "/mnt1")


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
    assert judge(parse_map_sync(text, status)).verdict is verdict


class FakeSysfs:
    """Enough of a guest's sysfs for the script, and a guest whose shell sees it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.bin = root / "bin"
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
        """A disk below a namespace device, as the kernel shows it."""
        (parent / "block" / name).mkdir(parents=True)
        (parent / "block" / name / "device").symlink_to(parent)
        (self.root / "block" / name).symlink_to(parent / "block" / name)

    def tool(self, name: str, text: str) -> None:
        (self.bin / name).write_text(f"#!/bin/sh\n{text}\n")
        (self.bin / name).chmod(0o755)

    def run(
        self, command: str, *, timeout_s: float | None = None, stdin: bytes = b""
    ) -> CommandResult:
        done = subprocess.run(
            ["/bin/sh", "-c", command],
            input=stdin,
            capture_output=True,
            env={"PATH": f"{self.bin}:{os.environ['PATH']}"},
            timeout=30,
            check=False,
        )
        out, err = done.stdout.decode(), done.stderr.decode()
        return CommandResult(command, done.returncode, out, err, done.stdout, 0.0)


@pytest.fixture
def sysfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSysfs:
    fake = FakeSysfs(tmp_path / "sys")
    monkeypatch.setattr(pmem, "script", lambda: script(str(fake.root)))
    return fake


@pytest.mark.parametrize("of_node", [True, False])
def test_found_by_drc_not_by_index(sysfs: FakeSysfs, of_node: bool) -> None:
    for number, slot in enumerate((3, 1, 2, 0, 16)):
        sysfs.add(number, drc_index(slot), of_node=of_node)
    for number, slot in enumerate((3, 1, 2, 0, 16)):
        found = pmem.region(cast(Guest, sysfs), slot)
        assert found.name == f"region{number}"
        assert found.node.drc_index == drc_index(slot)
        assert found.node.unit_guid == "a" * 300
        assert (found.deep_flush, found.deep_flush_mode, found.dimm) == (None, None, None)


def test_a_longer_index_is_another_one(sysfs: FakeSysfs) -> None:
    sysfs.add(0, 0x900000010)
    with pytest.raises(pmem.RegionError, match=r"there are: \n  region0: node \S+@900000010,"):
        pmem.region(cast(Guest, sysfs), 1)


def test_no_region_at_all(sysfs: FakeSysfs) -> None:
    with pytest.raises(pmem.RegionError, match="there are: none"):
        pmem.region(cast(Guest, sysfs), 0)


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
    assert pmem.region(cast(Guest, sysfs), 0).name == "region0"
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content)
    with pytest.raises(ContractError, match=message):
        pmem.region(cast(Guest, sysfs), 0)


def test_two_regions_of_one_drc(sysfs: FakeSysfs) -> None:
    sysfs.add(0, drc_index(0))
    sysfs.add(1, drc_index(0))
    with pytest.raises(pmem.RegionError, match="both region0 and region1 are of drc 90000000"):
        pmem.region(cast(Guest, sysfs), 0)


def test_region_without_driver(sysfs: FakeSysfs) -> None:
    sysfs.add(0, drc_index(0), driver=False)
    with pytest.raises(pmem.RegionError, match="region0 has no driver"):
        pmem.region(cast(Guest, sysfs), 0)


def test_waits_for_a_region(sysfs: FakeSysfs) -> None:
    timer = threading.Timer(0.5, sysfs.add, (7, drc_index(4)))
    timer.start()
    started = time.monotonic()
    try:
        assert pmem.wait_for_region(cast(Guest, sysfs), 4, 10).name == "region7"
    finally:
        timer.join()
    assert 0.4 < time.monotonic() - started < 5


def test_waiting_ends(sysfs: FakeSysfs) -> None:
    started = time.monotonic()
    with pytest.raises(pmem.RegionError, match="within 1 s"):
        pmem.wait_for_region(cast(Guest, sysfs), 4, 1)
    assert 1 <= time.monotonic() - started < 5


def _with_tools(sysfs: FakeSysfs, made_on: Callable[[Path], Path]) -> Path:
    device = sysfs.add(0, drc_index(0))
    sysfs.add_disk("pmem9", made_on(device))
    sysfs.tool(
        "ndctl",
        'printf \'{\\n  "dev":"namespace0.0",\\n  "mode":"fsdax",\\n  "size":1048576,\\n'
        '  "uuid":"u",\\n  "blockdev":"pmem9"\\n}\\n\'',
    )
    log = sysfs.root / "log"
    for name in ("mkfs.xfs", "mkfs.ext4", "mount"):
        sysfs.tool(name, f'echo "{name} $*" >> {log}')
    return log


def test_namespace_is_proven_to_be_the_regions(sysfs: FakeSysfs) -> None:
    _with_tools(sysfs, lambda device: device / "pfn0.0")
    guest = cast(Guest, sysfs)
    made = pmem.create_fsdax(guest, pmem.region(guest, 0))
    assert (made.name, made.path, made.region) == ("pmem9", "/dev/pmem9", "region0")
    assert made.size_bytes == MIB


def test_no_file_system_on_another_regions_disk(sysfs: FakeSysfs) -> None:
    log = _with_tools(sysfs, lambda device: device.with_name("region01") / "pfn0.0")
    with pytest.raises(ContractError, match=r"step 'namespace'(.|\n)*which is not below"):
        pmem.dax_mount(cast(Guest, sysfs), 0, "xfs", "/mnt1")
    assert not log.exists()


def test_commands_of_a_dax_mount(sysfs: FakeSysfs, tmp_path: Path) -> None:
    log = _with_tools(sysfs, lambda device: device / "pfn0.0")
    target = tmp_path / "mnt with space"
    # mount is a stand-in here, so the step must find that nothing is mounted.
    with pytest.raises(ContractError, match=r"step 'mount'(.|\n)*not in /proc/self/mounts"):
        pmem.dax_mount(cast(Guest, sysfs), 0, "xfs", str(target), options="dax=always,ro")
    page = os.sysconf("SC_PAGESIZE")
    assert log.read_text().splitlines() == [
        f"mkfs.xfs -q -f -b size={page} /dev/pmem9",
        f"mount -t xfs -o dax=always,ro /dev/pmem9 {target}",
    ]


def test_make_filesystem_alone(sysfs: FakeSysfs) -> None:
    log = _with_tools(sysfs, lambda device: device / "pfn0.0")
    pmem.make_filesystem(cast(Guest, sysfs), "/dev/pmem9", "ext4", 4096)
    assert re.fullmatch(r"mkfs\.ext4 .*-b 4096 .*/dev/pmem9\n", log.read_text())
    sysfs.tool("mkfs.ext4", "echo 'no such device' >&2; exit 7")
    with pytest.raises(ContractError, match=r"status 7:\nno such device"):
        pmem.make_filesystem(cast(Guest, sysfs), "/dev/pmem9", "ext4", 4096)


def test_a_file_system_is_not_taken_for_a_missing_region(sysfs: FakeSysfs) -> None:
    """Status 3 means "no region" only while the region is being looked for."""
    _with_tools(sysfs, lambda device: device / "pfn0.0")
    sysfs.tool("mkfs.xfs", "exit 3")
    with pytest.raises(ContractError, match="step 'filesystem' ended with status 3") as caught:
        pmem.dax_mount(cast(Guest, sysfs), 0, "xfs", "/mnt1")
    assert not isinstance(caught.value, pmem.RegionError)


def test_slots_that_no_machine_has() -> None:
    for slot in (-1, 32):
        with pytest.raises(ValueError, match=f"slot {slot} "):
            pmem.region(recorded("pmem-on"), slot)
