# SPDX-License-Identifier: GPL-2.0-or-later
"""`paprscm doctor` finds missing packages, and prints the line that installs them."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import pytest
from altered_qemu import altered_qemu
from rich.console import Console

from paprscm.commands import doctor
from paprscm.commands.doctor import Finding
from paprscm.debian import packages as debian
from paprscm.debian.apt import UnavailableError
from paprscm.debian.packages import Archive
from paprscm.errors import ConfigError
from paprscm.host.resources import Resources
from paprscm.settings import Settings


@pytest.fixture
def unreachable(tmp_path: Path) -> Settings:
    """Settings whose mirror does not answer: apt tries for 7 s."""
    mirror = "http://127.0.0.1:9/debian"
    return Settings(cache_dir=tmp_path / "cache", scratch_dir=tmp_path, mirror=mirror)


@pytest.fixture
def complete(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Files that each suite of the mirror lacks; other suites do not exist."""
    lacking: dict[str, list[str]] = {suite: [] for suite in debian.AUTO_SUITES}

    def absent(_: Archive, _packages: list[str], *, suite: str, arch: str) -> object:
        if suite not in lacking:
            raise UnavailableError(f"the mirror has no suite {suite}")
        return 125_000_000, lacking[suite]

    monkeypatch.setattr(Archive, "absent_files", absent)
    return lacking


@pytest.fixture
def chosen(unreachable: Settings, complete: dict[str, list[str]]) -> Settings:
    """The same with a mirror that is complete."""
    del complete
    return unreachable


def by_subject(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.subject: finding for finding in findings}


def test_package_list_names_package_proof_and_reason() -> None:
    text = "# all\n\nmake  make  # builds\nkeys  /k.gpg  keyring  # trust\ncross /x - # more\n"
    packages = doctor.parse_host_packages(text)
    assert [(p.name, p.proof, p.reason, p.fedora) for p in packages] == [
        ("make", "make", "builds", "make"),
        ("keys", "/k.gpg", "trust", "keyring"),
        ("cross", "/x", "more", ""),
    ]
    with pytest.raises(ConfigError, match="line 2: 'gcc # no proof'"):
        doctor.parse_host_packages("make make\ngcc # no proof\n")


@pytest.mark.parametrize(
    ("proof", "expected"),
    [
        ("sh", True),
        ("no-such-command", False),
        ("/etc/passwd", True),
        ("/no/such/file", False),
        ("module:json", True),
        ("module:no_such_module", False),
    ],
)
def test_proofs(proof: str, expected: bool) -> None:
    assert doctor.HostPackage("p", proof, "").is_installed is expected


def test_every_line_of_the_list_has_a_reason() -> None:
    packages = doctor.parse_host_packages(doctor.HOST_PACKAGES.read_text())
    assert [p.name for p in packages if not p.reason] == []
    assert len({p.name for p in packages}) == len(packages) >= 10


def test_machine_without_tools(
    chosen: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    findings = doctor.inspect_host(chosen)
    assert doctor.is_broken(findings)
    line = doctor.install_line(findings)
    assert line is not None
    assert line.startswith("apt install ")
    assert {"qemu-system-ppc", "gcc-powerpc64le-linux-gnu", "apt"} <= set(line.split())


@pytest.mark.parametrize(
    ("release", "line"),
    [
        ({"ID": "debian"}, "apt install libc6-dev cross"),
        ({"ID": "ubuntu", "ID_LIKE": "debian"}, "apt install libc6-dev cross"),
        ({"ID": "fedora"}, "dnf install glibc-devel"),
        ({"ID": "rocky", "ID_LIKE": "rhel centos fedora"}, "dnf install glibc-devel"),
        ({"ID": "arch"}, "Debian's names: libc6-dev cross"),
    ],
)
def test_packages_have_the_names_of_this_system(
    monkeypatch: pytest.MonkeyPatch, release: dict[str, str], line: str
) -> None:
    monkeypatch.setattr("platform.freedesktop_os_release", lambda: release)
    text = "libc6-dev /gone glibc-devel # headers\ncross /gone2 - # more\n"
    findings = doctor._packages(doctor.parse_host_packages(text))
    assert doctor.install_line(findings) == line
    if release["ID"] == "arch":
        assert "/gone: headers (Debian and Ubuntu: libc6-dev, Fedora: glibc" in findings[0].text
        assert "Fedora: none" in findings[1].text


def test_this_machine(chosen: Settings) -> None:
    findings = by_subject(doctor.inspect_host(chosen))
    assert findings["host packages"].grade == "ok"
    assert findings["python"].grade == "ok"
    assert "spapr-nvdimm" in findings["QEMU"].text
    assert findings["userland"].text == "Debian trixie can be fetched, 125 MB"
    assert not doctor.is_broken(list(findings.values()))
    # It creates nothing except the record of QEMU's facts.
    assert {path.name for path in chosen.cache_dir.iterdir()} <= {"qemu-facts", "locks"}


def test_mirror_is_asked_for_the_packages(chosen: Settings, complete: dict[str, list[str]]) -> None:
    complete["trixie"].append("libc6_2.41_ppc64el.deb")
    findings = [f for f in doctor.inspect_host(chosen) if f.subject in ("userland", "mirror")]
    assert [f.grade for f in findings] == ["note", "ok"]
    assert findings[0].text == "Debian trixie: the mirror lacks libc6_2.41_ppc64el.deb"
    assert findings[1].text.startswith("Debian bookworm")
    only = dataclasses.replace(chosen, userland_suite="trixie,potato")
    findings = [f for f in doctor.inspect_host(only) if f.subject in ("userland", "mirror")]
    assert [f.grade for f in findings] == ["note", "note", "missing"]
    assert "no suite of trixie, potato is complete" in findings[2].text


def test_mirror_that_does_not_answer(unreachable: Settings) -> None:
    findings = by_subject(doctor.inspect_host(unreachable))
    assert findings["mirror"].grade == "missing"
    assert "cannot be reached" in findings["mirror"].text


def test_a_qemu_of_debian_is_not_fetched(chosen: Settings) -> None:
    findings = by_subject(doctor.inspect_host(dataclasses.replace(chosen, qemu="debian:trixie")))
    assert findings["QEMU"].grade == "note"
    assert "will be fetched" in findings["QEMU"].text


def test_a_wrong_qemu_is_reported(chosen: Settings) -> None:
    findings = by_subject(doctor.inspect_host(dataclasses.replace(chosen, qemu="/bin/false")))
    assert findings["QEMU"].grade == "missing"
    assert "is not a QEMU" in findings["QEMU"].text


def test_missing_features_of_a_qemu_are_noted(chosen: Settings, tmp_path: Path) -> None:
    script = altered_qemu(tmp_path, '"virtio-rng-pci"', '"gone"')
    noted = by_subject(doctor.inspect_host(dataclasses.replace(chosen, qemu=str(script))))["QEMU"]
    assert noted.grade == "note"
    assert "no virtio-rng-pci, so tests with guests are cancelled" in noted.text
    assert "the flush shim must be preloaded into QEMU itself, so tests that need" in noted.text


def test_unavailable_kvm_is_reported(chosen: Settings) -> None:
    findings = by_subject(doctor.inspect_host(dataclasses.replace(chosen, accel="kvm")))
    assert findings["accelerator"].grade == "missing"


def test_number_of_concurrent_tests(chosen: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "read_resources", lambda: Resources(4, 8192))
    findings = by_subject(doctor.inspect_host(chosen))
    assert findings["machine"] == Finding("ok", "machine", "4 CPUs, 8.0 GiB of memory available")
    assert findings["concurrency"].grade == "ok"
    assert findings["concurrency"].text.startswith("4: 1 for each of 4 CPUs")


def test_too_little_memory_for_a_guest_is_noted(
    chosen: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        doctor, "read_resources", lambda: Resources(1, 1500, memory_from="memory.max")
    )
    findings = by_subject(doctor.inspect_host(chosen))
    assert findings["concurrency"].grade == findings["machine"].grade == "note"
    assert findings["concurrency"].text.startswith("1, which may not fit: 1.5 GiB")
    assert "(by the cgroup's memory.max)" in findings["machine"].text
    assert not doctor.is_broken([findings["concurrency"]])


def test_unusable_folders_are_reported(chosen: Settings, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    wrong = dataclasses.replace(chosen, cache_dir=file / "cache", scratch_dir=file)
    findings = by_subject(doctor.inspect_host(wrong))
    assert findings["cache"].grade == "missing"
    assert "set cache_dir" in findings["cache"].text
    assert findings["scratch"].grade == "missing"


MOUNTINFO = """\
22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
23 22 0:21 / /fast rw shared:2 - tmpfs tmpfs rw
24 22 0:22 / /a\\040b rw - xfs /dev/vdb rw
25 24 0:23 / /a\\040b rw - btrfs /dev/vdc rw
"""


def test_file_system_of_a_path(tmp_path: Path) -> None:
    table = tmp_path / "mountinfo"
    table.write_text(MOUNTINFO)
    assert doctor.filesystem_type(Path("/nonexistent/x"), table) == "ext4"
    assert doctor.filesystem_type(Path("/fast/x/y"), table) == "tmpfs"
    assert doctor.filesystem_type(Path("/faster"), table) == "ext4"
    # The later of two mounts on one mount point hides the earlier one.
    assert doctor.filesystem_type(Path("/a b/c"), table) == "btrfs"


def test_scratch_in_memory_is_noted(chosen: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "filesystem_type", lambda _: "tmpfs")
    findings = by_subject(doctor.inspect_host(chosen))
    assert findings["scratch"].grade == "note"
    assert "fdatasync" in findings["scratch"].text
    assert findings["cache"].grade == "ok", "the cache need not survive a power cut"


def test_shown_within_80_columns() -> None:
    findings = [
        Finding(
            "ok", "QEMU", "7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3): spapr-nvdimm, pmem, x-vof"
        ),
        Finding("missing", "package", "bison: [really]", ("bison",)),
        Finding("missing", "package", "flex: kernel build", ("flex", "bison")),
    ]
    out = io.StringIO()
    doctor.print_findings(findings, Console(file=out, width=80))
    *lines, last = out.getvalue().splitlines()
    assert max(len(line) for line in lines) <= 80
    assert "bison: [really]" in out.getvalue()
    assert last == "apt install bison flex"
