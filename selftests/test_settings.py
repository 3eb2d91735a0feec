# SPDX-License-Identifier: GPL-2.0-or-later
"""Settings from the command line and the file; a wrong one is refused."""

from __future__ import annotations

import pwd
from pathlib import Path

import pytest

from paprscm import settings
from paprscm.commands.dimm_syntax import parse_nvdimm, parse_size
from paprscm.errors import ConfigError
from paprscm.vm.machine import MIB


def write(folder: Path, text: str) -> Path:
    config = folder / "avocado.cfg"
    config.write_text(text)
    return config


def test_the_command_line_overrides_the_file(tmp_path: Path) -> None:
    config = write(tmp_path, "[paprscm]\nsmp = 4\nqemu = debian:sid\n")
    read = settings.load({"smp": "1", "qemu": None}, config=config)
    assert (read.smp, read.qemu) == (1, "debian:sid")


def test_types_are_converted(tmp_path: Path) -> None:
    config = write(tmp_path, "[paprscm]\nsilence_limit_s = 2.5\nmodules = ~/m\nmemory_mib=600\n")
    read = settings.load(config=config)
    assert read.silence_limit_s == 2.5
    assert read.modules == Path.home() / "m"
    assert read.memory_mib == 600


@pytest.mark.parametrize("kernel", ["default", "debug"])
def test_own_kernels_have_pages_of_either_size(tmp_path: Path, kernel: str) -> None:
    config = write(tmp_path, f"[paprscm]\nkernel = {kernel}\npage_size = 4k\n")
    read = settings.load(config=config)
    assert (read.kernel, read.page_size) == (kernel, "4k")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kernal = x", r"there is no setting 'kernal' .*did you mean kernel\?"),
        ("smp = two", "smp=two is not a number"),
        ("smp = 0", "smp=0 is out of range"),
        ("firmware = uefi", "one of vof, slof"),
        ("page_size = 16k", "one of 64k, 4k"),
        ("page_size = 4k\nkernel = /boot/vmlinux", "page_size=4k applies to the default and the "),
        ("command_limit_s = 0", "command_limit_s must be more than 0"),
    ],
)
def test_bad_settings_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings.load(config=write(tmp_path, f"[paprscm]\n{text}\n"))


def test_a_file_that_is_not_an_ini_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"avocado\.cfg cannot be read"):
        settings.load(config=write(tmp_path, "smp = 1\n"))


def test_a_user_without_home_needs_a_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def unknown(_uid: int) -> None:
        raise KeyError

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    nowhere = Path("nonexistent.cfg")
    with pytest.raises(ConfigError, match=r"has no home folder \(set HOME, or cache_dir"):
        settings.load(config=nowhere)
    with pytest.raises(ConfigError, match=r"^~/c: user \d+ has no home"):
        settings.load({"cache_dir": "~/c"}, config=nowhere)
    assert settings.load({"cache_dir": "/c"}, config=nowhere).cache_dir == Path("/c")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert settings.load(config=nowhere).cache_dir == Path("/x/paprscm")


def test_every_setting_has_a_meaning() -> None:
    assert all(settings.meaning(name) for name in settings.names())


@pytest.mark.parametrize(
    ("text", "size"), [("1", 1), ("128K", 131072), ("512M", 512 * MIB), ("1GiB", 1024 * MIB)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


def test_a_dimm_is_parsed() -> None:
    nvdimm = parse_nvdimm("pmem=on,size=1G,label=256K,slot=5,share=off,device=nvdimm", slot=0)
    assert (nvdimm.pmem, nvdimm.share, nvdimm.slot, nvdimm.device) == (True, False, 5, "nvdimm")
    assert (nvdimm.size_bytes, nvdimm.label_bytes) == (1024 * MIB, 262144)


def test_an_empty_text_is_a_dimm_with_defaults() -> None:
    assert parse_nvdimm("", slot=3).slot == 3


def test_an_existing_file_decides_the_size(tmp_path: Path) -> None:
    file = tmp_path / "backing"
    with file.open("wb") as handle:
        handle.truncate(256 * MIB + 131072)
    assert parse_nvdimm(f"file={file}", slot=0).size_bytes == 256 * MIB


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pmen=on", r"a DIMM has no 'pmen' \(did you mean pmem\?\)"),
        ("pmem", "pmem of a DIMM needs a value"),
        ("pmem=yes", "pmem=yes is neither on nor off"),
        ("size=12Q", "'12Q' is not a size"),
        ("slot=-1", "slot=-1 is not a number"),
        ("size=300M", "not a multiple of 256 MiB"),
        ("file=/nonexistent", "backing file /nonexistent"),
    ],
)
def test_bad_dimms_are_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_nvdimm(text, slot=0)


def test_the_texts_of_settings_are_read_back() -> None:
    chosen = settings.load({"smp": "4", "offline": "yes", "modules": "/m", "command_limit_s": "5"})
    changed = settings.changed(chosen)
    assert changed == {"smp": "4", "offline": "yes", "modules": "/m", "command_limit_s": "5.0"}
    assert settings.load(changed) == chosen
    # Settings of reports do not make another environment.
    assert settings.changed(settings.load({"formats": "junit", "origin": "ci"})) == {}
    texts = settings.as_texts(settings.Settings())
    assert settings.load(texts) == settings.Settings()
