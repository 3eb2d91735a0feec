# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMU's features are queried once; an unsuitable program is refused with a hint."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import stat
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from altered_qemu import altered_qemu

from paprscm.debian.packages import Archive
from paprscm.emulator import binary, capabilities
from paprscm.errors import CapabilityError, ConfigError, Error, HostError
from paprscm.host.cache import Cache

HOST_QEMU = shutil.which(capabilities.BINARY) or ""
needs_qemu = pytest.mark.skipif(not HOST_QEMU, reason="needs qemu-system-ppc64")


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def resolve(cache: Cache, setting: str | Path) -> binary.Qemu:
    return binary.resolve(Archive(cache), str(setting))


def program(path: Path, script: str) -> Path:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


# A stand-in for QEMU's monitor, with chosen features.
FAKE = r"""
import json, os, sys
VERSION = {"qemu": {"major": 4, "minor": 2, "micro": 1}, "package": ""}
def say(message): print(json.dumps(message), flush=True)
def answer(message): say({**message, **({"id": asked["id"]} if "id" in asked else {})})
say({"QMP": {"version": VERSION, "capabilities": []}})
# A client need not end its messages with a newline.
while content := os.read(0, 65536):
    asked = json.loads(content)
    name = asked["execute"]
    if name == "query-version": answer({"return": VERSION})
    elif name == "query-target": answer({"return": {"arch": TARGET}})
    elif name == "query-machines": answer({"return": MACHINES})
    elif name == "query-kvm": answer({"return": {"present": True, "enabled": False}})
    elif name == "qom-list-properties" and asked["arguments"]["typename"] in TYPES:
        say({"event": "NOISE", "timestamp": {"seconds": 1, "microseconds": 2}})
        answer({"return": [{"name": "size"}]})
    elif name == "qom-list-properties": answer({"error": {"class": "DeviceNotFound", "desc": "no"}})
    else: answer({"return": []})
"""


GUEST_TYPES = tuple(capabilities.GUEST_TYPES)


def fake_qemu(
    folder: Path,
    *,
    target: str = "ppc64",
    types: tuple[str, ...] = ("spapr-nvdimm", "pseries-4.2-machine"),
    machines: Any = ({"name": "pseries-4.2", "alias": "pseries"},),
) -> Path:
    folder.mkdir(exist_ok=True)
    values = f"TARGET, TYPES, MACHINES = {target!r}, {types!r}, {list(machines)!r}"
    (folder / "fake.py").write_text(values + FAKE)
    return program(folder / "qemu", f"exec python3 {folder / 'fake.py'}")


@needs_qemu
def test_features_of_the_host_s_qemu(cache: Cache) -> None:
    qemu = resolve(cache, "auto")
    assert qemu.argv_prefix == (HOST_QEMU,)
    text = subprocess.run([HOST_QEMU, "--version"], capture_output=True, text=True, check=True)
    assert ".".join(map(str, qemu.version)) in text.stdout
    assert qemu.version_text.startswith(".".join(map(str, qemu.version)))
    assert re.fullmatch(r"pseries-\d+\.\d+", qemu.machine)
    assert qemu.has("spapr-nvdimm", "label-size")
    assert qemu.has("memory-backend-file", "mem-path")
    assert not qemu.has("memory-backend-ram", "mem-path")
    assert qemu.has("machine", "x-vof") is qemu.has_vof
    assert "power9_v2.0" in qemu.cpu_models
    assert qemu.pseries_types[-1] == qemu.machine
    assert qemu.pseries_types.index("pseries-6.2") < qemu.pseries_types.index("pseries-7.0")
    assert "device_add" in qemu.qmp_commands
    assert "x-ignore-shared" in qemu.migration_capabilities


@needs_qemu
def test_features_agree_with_the_help_text(cache: Cache, tmp_path: Path) -> None:
    qemu = resolve(cache, "auto")

    def help_text(*words: str) -> str:
        argv = [*qemu.argv_prefix, *words]
        return subprocess.run(argv, capture_output=True, text=True, check=True).stdout

    device = help_text("-device", "spapr-nvdimm,help")
    assert qemu.has_pmem_override is ("pmem-override=" in device)
    backend = help_text("-object", "memory-backend-file,help")
    assert qemu.has_pmem is bool(re.search(r"^\s*pmem=", backend, re.MULTILINE))
    # The help text hides experimental options.
    # Not to /dev/null: QEMU replaces the file (g_file_set_contents), root's device as well.
    argv = [*qemu.argv_prefix, "-machine", f"pseries,x-vof=on,dumpdtb={tmp_path / 'tree'}"]
    tried = subprocess.run([*argv, "-display", "none"], capture_output=True, text=True, check=False)
    assert qemu.has_vof is ("x-vof" not in tried.stderr)


@needs_qemu
def test_qemu_is_queried_only_once(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    first = resolve(cache, "auto")
    monkeypatch.setattr(binary, "ask", lambda *_: pytest.fail("queried again"))
    assert resolve(cache, "auto") == first


def test_unknown_type_is_a_programming_error(cache: Cache, tmp_path: Path) -> None:
    qemu = resolve(cache, fake_qemu(tmp_path / "q"))
    assert qemu.has("spapr-nvdimm")
    assert not qemu.has("nvdimm")
    with pytest.raises(KeyError):
        qemu.has("spapr-nvdim")


def test_old_qemu_without_extras(cache: Cache, tmp_path: Path) -> None:
    qemu = resolve(cache, fake_qemu(tmp_path / "q"))
    assert (qemu.version, qemu.version_text) == ((4, 2, 1), "4.2.1")
    assert not (qemu.has_pmem or qemu.has_pmem_override or qemu.has_vof)


def test_changed_binary_is_queried_again(cache: Cache, tmp_path: Path) -> None:
    path = fake_qemu(tmp_path / "q")
    first = resolve(cache, path)
    program(path, path.read_text() + "# rebuilt")
    assert resolve(cache, path).key != first.key


def test_qemu_without_spapr_nvdimm(cache: Cache, tmp_path: Path) -> None:
    path = fake_qemu(tmp_path / "q", types=("pseries-4.2-machine",))
    with pytest.raises(CapabilityError, match=r"4\.2\.1\) has no .* QEMU 7\.0; "):
        resolve(cache, path)


def test_qemu_without_pseries(cache: Cache, tmp_path: Path) -> None:
    with pytest.raises(CapabilityError, match="no pseries machine"):
        resolve(cache, fake_qemu(tmp_path / "q", machines=({"name": "powernv9"},)))


def test_qemu_for_another_target(cache: Cache, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a QEMU for x86_64, not for ppc64"):
        resolve(cache, fake_qemu(tmp_path / "q", target="x86_64"))


@needs_qemu
def test_this_hosts_qemu_can_run_guests(cache: Cache) -> None:
    qemu = resolve(cache, "auto")
    assert qemu.missing_for_guests == ()
    binary.require_guests(qemu)


@needs_qemu
def test_qemu_without_libslirp(cache: Cache, tmp_path: Path) -> None:
    # netmap is listed, but not compiled in, like "user" in a QEMU without libslirp.
    edit = '"type":"user"', '"type":"netmap","ifname":"x"'
    argv = [HOST_QEMU, "-M", "none", "-display", "none", "-netdev", "netmap,id=n,ifname=x"]
    tried = subprocess.run(argv, capture_output=True, text=True, check=False)
    if "not compiled into this" not in tried.stderr:
        pytest.skip("this QEMU has netmap")
    qemu = resolve(cache, altered_qemu(tmp_path, *edit))
    assert qemu.missing_for_guests == ("-netdev user (libslirp)",)
    with pytest.raises(CapabilityError, match=r"without -netdev user .*--enable-slirp"):
        binary.require_guests(qemu)


@needs_qemu
@pytest.mark.parametrize("name", GUEST_TYPES)
def test_qemu_without_a_device_of_guests(cache: Cache, tmp_path: Path, name: str) -> None:
    qemu = resolve(cache, altered_qemu(tmp_path, f'"{name}"', f'"{name}-gone"'))
    assert qemu.missing_for_guests == (name,)
    with pytest.raises(CapabilityError, match=f"cannot run the suite's guests: .* {name} "):
        binary.require_guests(qemu)


@needs_qemu
def test_new_qemu_without_spapr_nvdimm(cache: Cache, tmp_path: Path) -> None:
    """Like a QEMU configured with --without-default-devices."""
    edit = '"typename":"spapr-nvdimm"', '"typename":"gone"'
    with pytest.raises(CapabilityError, match=r"no spapr-nvdimm device \(build it with CONFIG_NV"):
        resolve(cache, altered_qemu(tmp_path, *edit))


@pytest.mark.parametrize(
    ("script", "kind", "message"),
    [
        ("exit 0", HostError, "does not start: exit status 0; it printed nothing"),
        ("echo 'usage: thing' >&2; exit 2", ConfigError, "is not a QEMU: exit status 2; usage"),
        ("while :; do echo y; done", ConfigError, "is not a QEMU"),
        ("echo '[]'; cat", ConfigError, "is not a QEMU"),
        ("echo '{\"QMP\": 3}'; cat", ConfigError, "is not a QEMU"),
        ("kill -SEGV $$", HostError, "does not start: killed by SIGSEGV"),
        ("echo 'qemu: -M none: boom' >&2; exit 1", HostError, "does not start: .*boom"),
        (
            "echo 'error while loading shared libraries: libpmem.so.1: gone' >&2; exit 127",
            HostError,
            "the library libpmem.so.1 is missing",
        ),
    ],
)
def test_programs_without_a_valid_answer(
    cache: Cache, tmp_path: Path, script: str, kind: type[Error], message: str
) -> None:
    path = program(tmp_path / "thing", script)
    with pytest.raises(kind, match=message):
        resolve(cache, path)
    # A failure is not cached.
    assert list(cache.root.rglob("*.json")) == []


def test_silent_program_times_out(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capabilities, "_ANSWER_LIMIT_S", 2.0)
    path = program(tmp_path / "thing", f"echo $$ > {tmp_path}/pid; sleep 60; true")
    with pytest.raises(HostError, match=r"did not answer for 2 s"):
        resolve(cache, path)
    pid = int((tmp_path / "pid").read_text())
    assert not Path(f"/proc/{pid}").exists(), "it was left behind"


def test_files_that_are_not_programs(cache: Cache, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("x")
    with pytest.raises(ConfigError, match=r"is not executable \(chmod \+x"):
        resolve(cache, plain)
    plain.chmod(0o755)
    with pytest.raises(ConfigError, match="Exec format error"):
        resolve(cache, plain)
    with pytest.raises(ConfigError, match="is a folder"):
        resolve(cache, tmp_path)
    with pytest.raises(ConfigError, match=r"no such file .*apt install qemu-system-ppc"):
        resolve(cache, tmp_path / "gone")


def test_host_without_qemu(cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostError, match="apt install qemu-system-ppc"):
        resolve(cache, "auto")


@pytest.mark.parametrize("suite", ["", "Trixie", "../x", "a b"])
def test_no_suite(cache: Cache, suite: str) -> None:
    with pytest.raises(ConfigError, match="is not the name of a suite"):
        resolve(cache, f"debian:{suite}")


def unpack_host_qemu(target: Path) -> None:
    """Create the files of debian.extract, as links to the host's own QEMU."""
    assert HOST_QEMU
    ldd = subprocess.run(["ldd", HOST_QEMU], capture_output=True, text=True, check=True).stdout
    libraries = target / "usr/lib/some-arch"
    libraries.mkdir(parents=True)
    for path in re.findall(r"(/\S+) \(0x", ldd):
        (libraries / Path(path).name).symlink_to(path)
        if "ld-linux" in path or "ld64" in path:
            link = target / path.lstrip("/")
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)
    (target / "usr/bin").mkdir()
    shutil.copy(HOST_QEMU, target / "usr/bin")
    (target / "usr/share/qemu").mkdir(parents=True)
    (target / "usr/share/doc").mkdir()


@needs_qemu
def test_fetched_qemu_runs_from_the_cache(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def extract(
        _: Archive, packages: list[str], *, suite: str, target: Path, **__: Any
    ) -> dict[str, str]:
        calls.append((packages, suite))
        unpack_host_qemu(target)
        return {}

    monkeypatch.setattr(Archive, "extract", extract)
    assert not binary.is_fetched(cache, "debian:potato")
    qemu = resolve(cache, "debian:potato")
    assert binary.is_fetched(cache, "debian:potato")
    assert qemu.path.is_relative_to(cache.root)
    assert not (qemu.path.parents[1] / "share/doc").exists()
    loader, option, libraries, program, *rest = qemu.argv_prefix
    assert (option, program, rest[0]) == ("--library-path", str(qemu.path), "-L")
    assert all(Path(word).is_relative_to(cache.root) for word in (loader, libraries, rest[1]))
    version = [*qemu.argv_prefix, "--version"]
    assert subprocess.run(version, check=False, capture_output=True).returncode == 0
    resolve(cache, "debian:potato")
    assert calls == [(["qemu-system-ppc"], "potato")]


@needs_qemu
def test_fetched_qemu_that_does_not_start_is_not_kept(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def extract(_: Archive, _packages: list[str], *, target: Path, **__: Any) -> dict[str, str]:
        unpack_host_qemu(target)
        next((target / "usr/lib/some-arch").glob("libglib*")).unlink()
        # The host's own copy must not be used.
        monkeypatch.setenv("LD_LIBRARY_PATH", "/nonexistent")
        (target / "usr/lib/some-arch/libglib-2.0.so.0").write_text("not a library")
        return {}

    monkeypatch.setattr(Archive, "extract", extract)
    with pytest.raises(Error, match=r"does not start|is not a QEMU|the library .* is missing"):
        resolve(cache, "debian:potato")
    assert not binary.is_fetched(cache, "debian:potato")


def test_answers_are_cached_by_binary(cache: Cache, tmp_path: Path) -> None:
    one, other = (
        resolve(cache, fake_qemu(tmp_path / "a")),
        resolve(cache, fake_qemu(tmp_path / "b")),
    )
    computed = []

    def compute() -> Any:
        computed.append(1)
        return {"dcbstps": False, "count": [len(computed)]}

    assert binary.remember(cache, one, "isa", compute) == {"dcbstps": False, "count": [1]}
    assert binary.remember(cache, one, "isa", compute) == {"dcbstps": False, "count": [1]}
    assert binary.remember(cache, other, "isa", compute) == {"dcbstps": False, "count": [2]}
    assert binary.remember(cache, one, "more", compute) == {"dcbstps": False, "count": [3]}
    assert {entry.kind for entry in cache.entries()} == {"qemu-facts"}


def test_failed_answer_is_not_cached(cache: Cache, tmp_path: Path) -> None:
    qemu = resolve(cache, fake_qemu(tmp_path / "a"))

    def fails() -> Any:
        raise HostError("boom")

    with pytest.raises(HostError, match="boom"):
        binary.remember(cache, qemu, "isa", fails)
    assert binary.remember(cache, qemu, "isa", lambda: 1) == 1


@pytest.fixture
def with_kvm(cache: Cache, tmp_path: Path) -> binary.Qemu:
    qemu = resolve(cache, fake_qemu(tmp_path / "q"))
    assert qemu.has_kvm
    return qemu


def test_kvm_only_on_power_hosts(with_kvm: binary.Qemu) -> None:
    assert binary.accel("auto", with_kvm, host="x86_64") == "tcg"
    assert binary.accel("tcg", with_kvm, host="ppc64le") == "tcg"
    with pytest.raises(CapabilityError, match="this host is x86_64"):
        binary.accel("kvm", with_kvm, host="x86_64")


def test_kvm_needs_a_working_device(with_kvm: binary.Qemu, tmp_path: Path) -> None:
    for device, reason in ((tmp_path / "gone", "No such file"), (Path("/dev/null"), "is not KVM")):
        assert binary.accel("auto", with_kvm, host="ppc64le", device=device) == "tcg"
        with pytest.raises(CapabilityError, match=reason):
            binary.accel("kvm", with_kvm, host="ppc64le", device=device)
    without = dataclasses.replace(with_kvm, has_kvm=False)
    with pytest.raises(CapabilityError, match="built without KVM"):
        binary.accel("kvm", without, host="ppc64le", device=Path("/dev/null"))


@pytest.mark.parametrize(("api", "expected"), [(12, "kvm"), (11, "tcg")])
def test_kvm_api_version(
    with_kvm: binary.Qemu, monkeypatch: pytest.MonkeyPatch, api: int, expected: str
) -> None:
    requests = []

    def ioctl(_handle: int, request: int, _argument: int) -> int:
        requests.append(request)
        return api

    monkeypatch.setattr("fcntl.ioctl", ioctl)
    assert binary.accel("auto", with_kvm, host="ppc64", device=Path(os.devnull)) == expected
    # _IO(0xAE, 0) with powerpc's direction bits.
    assert requests == [0x2000AE00]


@needs_qemu
def test_first_query_is_quick(cache: Cache) -> None:
    started = time.monotonic()
    resolve(cache, "auto")
    # 0.15 s on an idle machine; the margin is for a busy one.
    assert time.monotonic() - started < 3
