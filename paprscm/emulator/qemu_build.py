# SPDX-License-Identifier: GPL-2.0-or-later
"""Build QEMU from Debian's source, with patches, or from an own source tree."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from paprscm.build.make import run_build
from paprscm.build.patches import apply_series, in_words, set_patches
from paprscm.debian.packages import Archive, first_available, suites
from paprscm.debian.toolchain import require_program
from paprscm.emulator.capabilities import BINARY
from paprscm.errors import ConfigError, Error, HostError
from paprscm.host import process
from paprscm.host.cache import Cache
from paprscm.host.folders import require_make
from paprscm.log import progress, step
from paprscm.settings import expanded

BUILT = "built-qemu"
"""Kind of the cache's workspaces with the objects of a QEMU."""

_SOURCE = "qemu-source"
_NEEDS_BYTES = 250_000_000
_FIRMWARE = ("slof.bin", "vof.bin")
_BUNDLE = "qemu-bundle/usr/local/share/qemu"
"""A QEMU with this folder beside it loads its firmware from there (QEMU, qemu_init_exec_dir)."""

_OPTIONS = (
    *("--target-list=ppc64-softmmu", "--without-default-features", "--disable-werror"),
    *("--enable-system", "--enable-tcg", "--enable-slirp", "--enable-libpmem"),
    *("--enable-fdt=system", "--enable-pixman"),
)
_LIBRARIES_HINT = (
    "apt install ninja-build pkg-config python3-venv libglib2.0-dev libpixman-1-dev libslirp-dev "
    "libpmem-dev libfdt-dev zlib1g-dev"
)
_STEP = re.compile(r"\[(\d+)/(\d+)\] ")
_WRONG = re.compile(r"ERROR: |: (?:fatal )?error: |undefined reference|\berror: unable to ")


def build_debian(archive: Archive, setting: str, *, patches: Sequence[Path] = ()) -> Path:
    """Build the QEMU of a Debian suite incrementally, in one folder of the cache for all patches.

    Args:
        archive: the mirror of the source; its cache keeps source and objects.
        setting: the setting 'qemu': 'debian:SUITE', 'debian:SUITE=VERSION', or 'auto' for the first
            suite of a list whose source can be fetched.
        patches: applied to the source with Debian's own patches.

    Returns:
        The emulator, with its firmware beside it. The next build with this source replaces it.

    Raises:
        UnavailableError: no suite has the source.
        ConfigError: the setting is a path; or a patch does not apply or compile.
        HostError: a tool or a library is missing, or the source does not compile.
    """
    match = re.fullmatch(r"debian:([a-z][a-z0-9-]*)(?:=(.+))?", setting)
    if match is None and setting != "auto":
        raise ConfigError(
            f"qemu={setting} names no source", hint="set qemu=debian:SUITE, or give --source TREE"
        )
    # Before the download, to report a missing tool at once.
    compiler = _compiler()
    source = first_available(
        suites(match[1] if match else "auto"),
        lambda suite: _fetch(archive, suite, (match and match[2]) or ""),
        title="source of QEMU",
    )
    version = (source / "version").read_text().strip()
    fields = {"source": version, "options": " ".join(_OPTIONS), "compiler": compiler}
    with archive.cache.workspace(BUILT, fields, purpose="builds QEMU") as folder:
        set_patches(folder, lambda tree: _unpack(source, tree), patches)
        firmware = folder / _BUNDLE
        firmware.mkdir(parents=True, exist_ok=True)
        for name in _FIRMWARE:
            shutil.copyfile(source / name, firmware / name)
        with step(f"building QEMU {version}" + (f" with {in_words(patches)}" if patches else "")):
            # Debian's source lacks the firmware.
            _compile(
                folder / "tree",
                folder,
                *("--disable-install-blobs", "--with-pkgversion=paprscm"),
                python=_python_with_meson(folder / "python"),
                blame=ConfigError if patches else HostError,
            )
    return folder / BINARY


def build_tree(cache: Cache, tree: Path) -> Path:
    """Build the QEMU of an own source tree incrementally, in a folder of the cache.

    Args:
        cache: keeps the objects, as a workspace.
        tree: top of a QEMU source tree.

    Returns:
        The emulator, with links to the tree's firmware beside it.

    Raises:
        ConfigError: it is not a QEMU tree, or does not compile (with the compiler's first errors).
        HostError: a tool is missing.
    """
    tree = expanded(tree).resolve()
    if not (tree / "configure").is_file() or not (tree / "hw/ppc/spapr_nvdimm.c").is_file():
        raise ConfigError(
            f"{tree} is not the top of a QEMU source tree",
            hint="it must hold configure and hw/ppc/spapr_nvdimm.c (QEMU 5.1 or newer)",
        )
    fields = {"source": str(tree), "options": " ".join(_OPTIONS), "compiler": _compiler()}
    with cache.workspace(BUILT, fields, purpose=f"builds the QEMU of {tree}") as folder:
        with step(f"building the QEMU of {tree}"):
            _compile(tree, folder, blame=ConfigError, blame_configure=ConfigError)
        bundle = folder / "qemu-bundle"
        bundle.unlink(missing_ok=True)
        bundle.symlink_to("objects/qemu-bundle")
    return folder / BINARY


def _compiler() -> str:
    for tool in ("ninja", "pkg-config"):
        require_program(tool)
    return process.run([require_program("cc"), "--version"]).lines[0]


def _fetch(archive: Archive, suite: str, wanted: str) -> Path:
    """The cache entry with the files of the source package, its version, and the firmware."""

    def fill(entry: Path) -> None:
        with step(f"fetching the source of QEMU (Debian {suite})"):
            version = archive.fetch_source(
                "qemu", suite=suite, version=wanted, target=entry, title="QEMU's source"
            )
            (entry / "version").write_text(version + "\n")
            # The package is in the index of each architecture.
            download = archive.download(
                ["qemu-system-data"], suite=suite, arch="amd64", title="QEMU's firmware", alone=True
            )
            download.unpack(entry / "root", title="QEMU's firmware")
            for name in _FIRMWARE:
                (entry / "root/usr/share/qemu" / name).rename(entry / name)
            shutil.rmtree(entry / "root")
            download.remove()

    fields = {"package": "qemu", "suite": suite, "version": wanted}
    return archive.cache.ensure(_SOURCE, fields, fill, needs_bytes=_NEEDS_BYTES).path


def _unpack(source: Path, tree: Path) -> None:
    with step("unpacking the source of QEMU"):
        tree.mkdir()
        for pattern, words in (("*.orig.tar.*", ["--strip-components=1"]), ("*.debian.tar.*", [])):
            (file,) = source.glob(pattern)
            process.run(["tar", "-xf", file, "-C", tree, "--no-same-owner", *words])
        apply_series(tree, tree / "debian/patches")


def _python_with_meson(folder: Path) -> Path:
    """A virtual environment with meson, which Debian has removed from its source of QEMU."""
    python = folder / "bin/python"
    if not (folder / "complete").exists():
        shutil.rmtree(folder, ignore_errors=True)
        process.run([sys.executable, "-m", "venv", folder])
        try:
            process.run([python, "-m", "pip", "install", "--quiet", "meson"])
        except HostError as error:
            raise HostError(
                f"meson, which builds QEMU, cannot be installed: {error.message}",
                hint="check the network, and pip's configuration",
            ) from error
        (folder / "complete").touch()
    return python


def _compile(
    tree: Path,
    folder: Path,
    *options: str,
    python: Path = Path(sys.executable),
    blame: type[Error],
    blame_configure: type[Error] = HostError,
) -> None:
    """Configure and compile a tree in folder/objects, and publish the emulator by rename.

    ninja is safe against being killed: it compiles an object that its log lacks once more.
    """
    require_make(tree)
    require_make(folder)
    objects, log_file = folder / "objects", folder / "build.log"
    log_file.write_bytes(b"")
    if not (objects / "build.ninja").exists():
        shutil.rmtree(objects, ignore_errors=True)
        objects.mkdir()
        words = [str(tree / "configure"), f"--python={python}", *_OPTIONS, *options]
        with step("configuring QEMU"):
            _run(words, objects, log_file, blame_configure)
    with progress("QEMU's objects", None, "objects") as bar:

        def line(text: str) -> None:
            if match := _STEP.match(text):
                bar.update(int(match[1]), int(match[2]))

        _run(["ninja", BINARY], objects, log_file, blame, line)
    fresh = folder / f".{BINARY}.new"
    shutil.copy2(objects / BINARY, fresh)
    fresh.replace(folder / BINARY)


def _run(
    words: Sequence[str],
    objects: Path,
    log_file: Path,
    blame: type[Error],
    on_line: Callable[[str], None] = lambda _: None,
) -> None:
    env = {**os.environ, "LC_ALL": "C"}
    what = "the build of QEMU" if words[0] == "ninja" else "the configuration of QEMU"
    try:
        run_build(
            words, what, wrong=_WRONG, log_file=log_file, on_line=on_line, cwd=objects, env=env
        )
    except HostError as error:
        hint = error.hint if words[0] == "ninja" else f"{_LIBRARIES_HINT}; {error.hint}"
        raise blame(error.message, hint=hint) from error
