# SPDX-License-Identifier: GPL-2.0-or-later
"""Builds of a small tree with QEMU's interfaces (configure, ninja), by the real tools."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from paprscm.commands import cli
from paprscm.debian.packages import Archive
from paprscm.emulator import qemu_build
from paprscm.emulator.capabilities import BINARY
from paprscm.errors import ConfigError, HostError
from paprscm.host.cache import Cache

CONFIGURE = r"""#!/bin/sh
top=$(dirname "$0")
if [ -e "$top/pc-bios/fails" ]; then
	echo 'meson.build:1:0: ERROR: Dependency "glib-2.0" not found'
	exit 1
fi
mkdir -p qemu-bundle/usr/local/share/qemu
cat > build.ninja <<END
rule cc
  command = cc -c \$in -o \$out
rule link
  command = cc \$in -o \$out
build main.o: cc $top/main.c
build word.o: cc $top/word.c
build qemu-system-ppc64: link main.o word.o
END
echo "$@" > options
"""
FILES = {
    "configure": CONFIGURE,
    "hw/ppc/spapr_nvdimm.c": "",
    "main.c": "#include <stdio.h>\nextern const char *word;\nint main(void) { puts(word); }\n",
    "word.c": 'const char *word = "upstream";\n',
}

pytestmark = pytest.mark.skipif(
    not all(shutil.which(tool) for tool in ("ninja", "pkg-config", "cc", "patch", "xz")),
    reason="needs ninja, pkg-config, cc, patch and xz",
)


def make_tree(top: Path) -> Path:
    for name, text in FILES.items():
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_text(text)
    (top / "configure").chmod(0o755)
    return top


def patch(old: str, new: str, file: str = "word.c") -> str:
    line = 'const char *word = "{}";'
    return f"--- a/{file}\n+++ b/{file}\n@@ -1 +1 @@\n-{line.format(old)}\n+{line.format(new)}\n"


def write(file: Path, text: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Archive:
    """The source of two suites, as if it had been fetched; sid's patches apply, forky's do not."""
    monkeypatch.setattr(qemu_build, "_python_with_meson", lambda _: Path(sys.executable))
    cache = Cache(tmp_path / "cache")
    make_tree(tmp_path / "upstream/qemu-11.1.3")

    def fill(entry: Path) -> None:
        debian = tmp_path / "packaging"
        write(debian / "debian/patches/series", "# Debian's\nword.patch -p1\n\n")
        write(debian / "debian/patches/word.patch", patch("upstream", "debian"))
        for name, folder, content in (
            ("qemu_11.1.3+ds.orig.tar.xz", tmp_path / "upstream", "qemu-11.1.3"),
            ("qemu_11.1.3+ds-1.debian.tar.xz", debian, "debian"),
        ):
            subprocess.run(["tar", "-cJf", entry / name, "-C", folder, content], check=True)
        for name in ("slof.bin", "vof.bin"):
            (entry / name).write_text(name)
        (entry / "version").write_text("1:11.1.3+ds-1\n")

    cache.ensure("qemu-source", {"package": "qemu", "suite": "sid", "version": ""}, fill)
    return Archive(cache, offline=True)


def build(archive: Archive, *patches: Path) -> str:
    """Build with the patches; return the output of the emulator."""
    path = qemu_build.build_debian(archive, "debian:sid", patches=patches)
    assert path.name == BINARY
    firmware = path.parent / "qemu-bundle/usr/local/share/qemu"
    assert sorted(file.name for file in firmware.iterdir()) == ["slof.bin", "vof.bin"]
    return subprocess.run([path], capture_output=True, text=True, check=True).stdout.strip()


def test_patches_are_applied_after_debians_and_replaced(archive: Archive, tmp_path: Path) -> None:
    first = write(tmp_path / "1.patch", patch("debian", "first"))
    second = write(tmp_path / "2.patch", patch("first", "second"))
    assert build(archive) == "debian"
    (folder,) = (archive.cache.root / qemu_build.BUILT).iterdir()
    unchanged = (folder / "objects/main.o").stat().st_mtime_ns
    assert build(archive, first, second) == "second"
    assert build(archive, first) == "first"
    assert build(archive) == "debian"
    assert (folder / "objects/main.o").stat().st_mtime_ns == unchanged, "compiled again"
    assert "--target-list=ppc64-softmmu" in (folder / "objects/options").read_text()


def test_a_patch_that_does_not_compile_is_the_users(archive: Archive, tmp_path: Path) -> None:
    assert build(archive) == "debian"
    broken = write(tmp_path / "broken.patch", patch("debian", '" wrong "'))
    with pytest.raises(ConfigError, match=r"word\.c:1:\d+: error: ") as caught:
        build(archive, broken)
    assert "build.log" in str(caught.value.hint)
    stale = write(tmp_path / "stale.patch", patch("upstream", "first"))
    with pytest.raises(ConfigError, match=r"stale\.patch does not apply"):
        build(archive, stale)
    assert build(archive) == "debian"


def test_a_missing_library_is_named_with_the_packages(archive: Archive, tmp_path: Path) -> None:
    text = "--- /dev/null\n+++ b/pc-bios/fails\n@@ -0,0 +1 @@\n+x\n"
    fails = write(tmp_path / "fails.patch", text)
    with pytest.raises(HostError, match=r'Dependency "glib-2\.0" not found') as caught:
        build(archive, fails)
    assert "libglib2.0-dev" in str(caught.value.hint)
    assert build(archive) == "debian", "it is not configured again"


@pytest.mark.parametrize("setting", ["/usr/bin/qemu-system-ppc64", "debian:", "sid"])
def test_only_debian_has_a_source(archive: Archive, setting: str) -> None:
    with pytest.raises(ConfigError, match="names no source") as caught:
        qemu_build.build_debian(archive, setting)
    assert "--source" in str(caught.value.hint)


def test_a_source_that_is_not_in_the_cache_is_fetched(archive: Archive) -> None:
    for setting in ("debian:forky", "debian:sid=10.2.2"):
        with pytest.raises(HostError, match="offline=yes"):
            qemu_build.build_debian(archive, setting)


def test_own_tree(archive: Archive, tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "tree")
    path = qemu_build.build_tree(archive.cache, tree)
    assert (path.parent / "qemu-bundle/usr/local/share/qemu").is_dir()
    write(tree / "word.c", 'const char *word = "mine";\n')
    assert qemu_build.build_tree(archive.cache, tree) == path
    assert subprocess.run([path], capture_output=True, check=True).stdout == b"mine\n"
    write(tree / "word.c", "const char *word = mine;\n")
    with pytest.raises(ConfigError, match=r"word\.c.*mine"):
        qemu_build.build_tree(archive.cache, tree)
    with pytest.raises(ConfigError, match="is not the top of a QEMU source tree"):
        qemu_build.build_tree(archive.cache, tmp_path)


def test_patch_with_a_tree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for kind in ("qemu", "kernel"):
        assert cli.main([kind, "build", "--source", str(tmp_path), "--patch", "x.patch"]) == 2
        assert f"git -C {tmp_path} apply x.patch" in capsys.readouterr().err
