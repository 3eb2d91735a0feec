# SPDX-License-Identifier: GPL-2.0-or-later
"""A DIMM that holds a file system at the guest's start: created once, then copied."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from paprscm.guest.dimm_content import KIND, DimmContents, GuestDimms
from paprscm.guest.environment import Environment
from paprscm.host.cache import Cache
from paprscm.map_sync.probe import map_sync
from paprscm.map_sync.verdict import judge_map_sync
from paprscm.pmem.mounts import DaxMount, dax_mount
from paprscm.vm.backing_files import ScratchFiles, is_blank, pack_content, unpack_content
from paprscm.vm.dimms import PMEM_OFF, PMEM_ON
from paprscm.vm.machine import MIB, Machine, Nvdimm

XFS = Nvdimm().holding("xfs")
INPUTS = {"kernel": "a", "userland": "b", "qemu": "c", "cpu": "d"}


@pytest.fixture
def contents(tmp_path: Path) -> DimmContents:
    return DimmContents(cache=Cache(tmp_path / "cache"), inputs=INPUTS)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A backing file that a guest has written to, in its first and in its last bytes."""
    path = tmp_path / "file"
    with path.open("wb") as target:
        target.truncate(64 * MIB)
        for offset in (3, 64 * MIB - 5):
            target.seek(offset)
            target.write(b"hello")
    return path


def test_a_copy_has_the_same_bytes_and_is_sparse(tmp_path: Path, file: Path) -> None:
    copy = tmp_path / "copy"
    with copy.open("wb") as target:
        target.truncate(64 * MIB)
    assert is_blank(copy)
    assert not is_blank(file)
    packed = tmp_path / "packed"
    pack_content(file, packed)
    unpack_content(packed, copy)
    # The cache computes the digest of the packed file.
    assert packed.stat().st_size < MIB
    assert copy.read_bytes() == file.read_bytes()
    assert copy.stat().st_blocks * 512 < MIB


def test_blocks_of_zeros_are_blank(tmp_path: Path) -> None:
    zeros = tmp_path / "zeros"
    zeros.write_bytes(bytes(MIB))
    os.sync()
    assert is_blank(zeros)


def test_what_is_stored_is_found_and_copied(
    tmp_path: Path, contents: DimmContents, file: Path
) -> None:
    assert contents.find(XFS) is None
    contents.store(XFS, file)
    with ScratchFiles(tmp_path, [XFS], image=contents.find) as files:
        content = files.paths[0].read_bytes()
        assert len(content) == XFS.file_bytes
        assert content[: 64 * MIB] == file.read_bytes()
        # A DIMM that should be empty is.
        assert is_blank(files.make(Nvdimm(slot=1)))


@pytest.mark.parametrize(
    "other",
    [
        XFS.holding("ext4"),
        XFS.at(1),
        XFS.at(0, 256 * MIB),
        dataclasses.replace(XFS, label_bytes=256 << 10),
        dataclasses.replace(XFS, device="nvdimm"),
        dataclasses.replace(XFS, uuid="7f9b6a0e-52f5-4d0a-8d5c-0c3f1f0b9a11"),
    ],
)
def test_another_dimm_has_another_content(
    contents: DimmContents, file: Path, other: Nvdimm
) -> None:
    contents.store(XFS, file)
    assert contents.find(other) is None


@pytest.mark.parametrize("name", INPUTS)
def test_other_inputs_make_another_content(contents: DimmContents, file: Path, name: str) -> None:
    contents.store(XFS, file)
    other = dataclasses.replace(contents, inputs={**INPUTS, name: "other"})
    assert other.find(XFS) is None


def test_backends_do_not_matter(contents: DimmContents, file: Path) -> None:
    """pmem=on and off are the same device for the guest's tools."""
    contents.store(XFS, file)
    assert contents.find(dataclasses.replace(XFS, pmem=True, pmem_override=True)) is not None


def test_a_content_is_used_once_in_a_guest(contents: DimmContents, file: Path) -> None:
    contents.store(XFS, file)
    dimms = GuestDimms(contents, lambda _slot: file)
    assert dimms.image(XFS) is not None
    assert not dimms.take(1, "xfs")
    assert dimms.take(0, "xfs")
    assert not dimms.take(0, "xfs")
    assert not dimms.should_keep(0, "xfs")


def test_only_the_content_of_an_empty_dimm_is_kept(
    tmp_path: Path, contents: DimmContents, file: Path
) -> None:
    blank = tmp_path / "blank"
    blank.write_bytes(bytes(MIB))
    for path, keep in ((file, False), (blank, True)):
        dimms = GuestDimms(contents, lambda _slot, path=path: path)  # type: ignore[misc]
        assert dimms.image(XFS) is None
        assert dimms.should_keep(0, "xfs") is keep
        assert not dimms.should_keep(0, "ext4")
    assert not GuestDimms(contents, lambda _slot: blank).should_keep(0, "xfs")


@pytest.mark.guest
def test_a_copy_is_judged_as_a_fresh_one(environment: Environment, tmp_path: Path) -> None:
    """Two kinds of DIMM, each fresh, stored by a guest, and copied by the next."""
    cache = Cache(tmp_path / "cache")
    contents = environment.equipment.contents
    assert contents is not None
    assert set(contents.inputs) == {"kernel", "userland", "qemu", "cpu", "maker"}
    equipment = dataclasses.replace(
        environment.equipment, contents=dataclasses.replace(contents, cache=cache)
    )
    own = dataclasses.replace(environment, equipment=equipment)
    nvdimms = (PMEM_ON.at(3, 512 * MIB).holding("xfs"), PMEM_OFF.at(5).holding("ext4"))
    seen: list[dict[int, tuple[DaxMount, str]]] = []
    for number in range(2):
        assert len(cache.entries()) == 2 * number
        with own.guest(Machine(nvdimms=nvdimms), folder=tmp_path / str(number)) as guest:
            result = {}
            for nvdimm in nvdimms:
                mount = f"/mnt/{nvdimm.slot}"
                facts = dax_mount(guest, nvdimm.slot, nvdimm.holds, mount)  # type: ignore[arg-type]
                verdict = judge_map_sync(map_sync(guest, f"{mount}/file")).verdict.value
                result[nvdimm.slot] = facts, verdict
            seen.append(result)
    assert seen[0] == seen[1]
    assert {slot: verdict for slot, (_facts, verdict) in seen[0].items()} == {
        3: "MAP_SYNC accepted",
        5: "MAP_SYNC refused",
    }
    assert {entry.kind for entry in cache.entries()} == {KIND}
