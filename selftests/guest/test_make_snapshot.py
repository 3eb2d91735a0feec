# SPDX-License-Identifier: GPL-2.0-or-later
"""A snapshot's key is independent of folders; only a QEMU's own failure is cached."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from paprscm.channel.command import TimedOutError
from paprscm.errors import ConfigError, Error, HostError, KilledError
from paprscm.guest import make_snapshot
from paprscm.guest.equipment import Equipment
from paprscm.guest.make_snapshot import Recipe
from paprscm.guest.report import ProbeError
from paprscm.host.cache import Cache
from paprscm.settings import Settings
from paprscm.vm.argv import Payload


def recipe(root: Path) -> Recipe:
    """A guest whose kernel and disk are entries of the cache below `root`."""
    cache = Cache(root)

    def fill(folder: Path) -> None:
        (folder / "vmlinux").write_text("kernel")
        (folder / "disk.img").write_text("disk")

    entry = cache.ensure("userland", {"suite": "forky"}, fill)
    equipment = Equipment(
        settings=Settings(cache_dir=root),
        qemu=(str(root / "qemu"),),
        payload=Payload(kernel=entry.path / "vmlinux", disk=entry.path / "disk.img"),
        client_key=entry.path / "key",
        host_key="",
    )
    binary: Any = SimpleNamespace(key="0", version_text="11.1", has=lambda *_: True)
    return Recipe(cache=cache, qemu=binary, equipment=equipment)


def test_same_content_in_another_folder(tmp_path: Path) -> None:
    first, other = recipe(tmp_path / "a"), recipe(tmp_path / "elsewhere" / "b")
    assert first.fields() == other.fields()
    disk = other.equipment.payload.disk
    (disk.parent / "manifest.json").write_text(
        (disk.parent / "manifest.json").read_text().replace('"sha256": "', '"sha256": "f')
    )
    assert first.fields()["files"] != other.fields()["files"]


@pytest.mark.parametrize(
    "error",
    [
        TimedOutError("a command did not end within 120 s"),
        ProbeError("gcc did not end within 120 s"),
        KilledError("QEMU was killed by SIGKILL"),
        ConfigError("the guest's kernel ignores QEMU's -append"),
    ],
)
def test_other_failures_are_not_cached(
    error: Error, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise error

    snapshot_recipe = recipe(tmp_path)
    monkeypatch.setattr(make_snapshot, "_save", refuse)
    with pytest.raises(type(error)):
        make_snapshot.ensure_snapshot(snapshot_recipe)
    assert make_snapshot.find_snapshot(snapshot_recipe) is None


def test_a_qemu_that_cannot_save_is_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise HostError("QEMU cannot save it")

    snapshot_recipe = recipe(tmp_path)
    monkeypatch.setattr(make_snapshot, "_save", refuse)
    assert make_snapshot.ensure_snapshot(snapshot_recipe).snapshot is None
    outcome = make_snapshot.find_snapshot(snapshot_recipe)
    assert outcome is not None
    assert "QEMU cannot save it" in outcome.reason
