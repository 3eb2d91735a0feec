# SPDX-License-Identifier: GPL-2.0-or-later
"""Folders in which builds or programs cannot work are refused before any download."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from paprscm.build import kbuild
from paprscm.debian import kernel_source
from paprscm.debian.packages import Archive
from paprscm.emulator import binary
from paprscm.errors import ConfigError
from paprscm.host.cache import Cache
from paprscm.host.folders import require_loader, require_make
from paprscm.settings import Settings


@pytest.mark.parametrize("char", " \t:%#$'\"&;()*?<>|\\")
def test_paths_that_make_cannot_handle(tmp_path: Path, char: str) -> None:
    with pytest.raises(ConfigError, match=r"cannot hold a build: its path has a .*cache_dir"):
        require_make(tmp_path / f"a{char}b")
    require_make(tmp_path / "a,b=d@e+f~g-h_ä")


@pytest.mark.parametrize("char", ":;$")
def test_paths_that_the_loader_cannot_handle(tmp_path: Path, char: str) -> None:
    with pytest.raises(ConfigError, match="cannot hold a fetched QEMU: its path has a"):
        require_loader(tmp_path / f"a{char}b")
    require_loader(tmp_path / "a b,c%d#e")


def test_a_file_system_that_is_mounted_noexec(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    examined = []

    def statvfs(path: Path) -> SimpleNamespace:
        examined.append(path)
        return SimpleNamespace(f_flag=os.ST_NOEXEC | os.ST_NOSUID)

    monkeypatch.setattr(os, "statvfs", statvfs)
    for require in (require_make, require_loader):
        with pytest.raises(ConfigError, match=f"{tmp_path} is mounted noexec"):
            require(tmp_path / "not" / "there yet".replace(" ", "-"))
    assert examined == [tmp_path, tmp_path]


def test_refused_before_anything_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch(*_: object, **__: object) -> None:
        pytest.fail("something was fetched")

    monkeypatch.setattr(kernel_source, "fetch_source", fetch)
    monkeypatch.setattr(Archive, "extract", fetch)
    odd = tmp_path / "a b:c"
    with pytest.raises(ConfigError, match="cannot hold a build"):
        kbuild.build_default(Archive(Cache(odd)), Settings(cache_dir=odd))
    with pytest.raises(ConfigError, match="cannot hold a fetched QEMU"):
        binary.resolve(Archive(Cache(odd)), "debian:sid")
