# SPDX-License-Identifier: GPL-2.0-or-later
"""Kernel builds: arguments of kbuild, its products, and the messages of failures.

The trees here are stand-ins: a Makefile prints and writes the same as kbuild, in milliseconds.
"""

from __future__ import annotations

import dataclasses
import gzip
import lzma
import os
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from paprscm.build import kbuild, kconfig
from paprscm.build.kconfig import Fragment, Requirement, default_fragment, fragments
from paprscm.build.make import Make
from paprscm.build.vmlinux import parse_config
from paprscm.debian import kernel_source, prerequisites
from paprscm.debian.apt import UnavailableError
from paprscm.debian.packages import Archive, Download
from paprscm.errors import ConfigError, HostError
from paprscm.host import process
from paprscm.host.cache import Cache
from paprscm.settings import Settings

# A minimal kbuild. If FAIL exists, the compilation fails; DROP names an option that is lost. The
# product must be a real object, because it is stripped with the real tool.
MAKEFILE = """\
CC := powerpc64le-linux-gnu-gcc
V := $(O)/.config

allnoconfig:
\t@test "$(ARCH) $(CROSS_COMPILE)" = "powerpc powerpc64le-linux-gnu-"
\t@test "$$KBUILD_BUILD_USER" = paprscm
\t@test -z "$$KBUILD_OUTPUT$$KCONFIG_CONFIG"
\t@echo allnoconfig >> $(O)/calls
\t@grep -v "$$(cat DROP 2>/dev/null || echo NOTHING)" $(KCONFIG_ALLCONFIG) > $(V)

olddefconfig:
\t@echo olddefconfig >> $(O)/calls

vmlinux modules: FORCE
\t@echo $@ >> $(O)/calls
\t@if [ -e FAIL ]; then echo "mm/fail.c:7:3: error: 'x' undeclared" >&2; exit 1; fi
\t@if [ $@ = vmlinux ]; then \\
\t\tfor i in 1 2 3; do echo "  CC      mm/$$i.o"; done; \\
\t\techo 'int main(void) { return 0; }' | $(CC) -g -x c - -nostdlib -e main -o $(O)/vmlinux; fi

modules_install: FORCE
\t@mkdir -p $(INSTALL_MOD_PATH)/lib/modules/6.0/kernel
\t@touch $(INSTALL_MOD_PATH)/lib/modules/6.0/kernel/xfs.ko
\t@ln -s /nowhere $(INSTALL_MOD_PATH)/lib/modules/6.0/build

FORCE:
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A stand-in for a kernel source tree."""
    top = tmp_path / "linux"
    (top / "arch/powerpc").mkdir(parents=True)
    (top / "arch/powerpc/Kconfig").write_text(
        'config PAPR_SCM\n\tdepends on PPC_PSERIES && MEMORY_HOTPLUG\n\ttristate "papr"\n'
        "\thelp\n\t  depends on NOTHING here\n"
    )
    (top / "Kbuild").touch()
    (top / "Makefile").write_text(MAKEFILE)
    return top


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    """An empty cache."""
    return Cache(tmp_path / "cache")


def test_builds_in_its_own_folder(
    tree: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Variables of a surrounding `make suite` or of a developer's shell must not reach kbuild.
    monkeypatch.setenv("MAKEFLAGS", "-n")
    monkeypatch.setenv("KBUILD_OUTPUT", "/elsewhere")
    monkeypatch.setenv("KCONFIG_CONFIG", "/elsewhere/.config")
    before = sorted(tree.rglob("*"))
    built = kbuild.build_tree(cache, tree)
    assert built.vmlinux.is_relative_to(cache.root)
    assert parse_config(built.config.read_text())["PAPR_SCM"] == "y"
    assert built.modules is None
    assert built.source == str(tree)
    assert "  CC      mm/3.o" in built.log.read_text()
    assert sorted(tree.rglob("*")) == before
    data = built.vmlinux.read_bytes()
    assert b".debug_info" not in data
    assert b".symtab" in data


def test_only_listed_variables_reach_a_build(
    tree: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    foreign = ["LLVM", "LLVM_IAS", "KCFLAGS", "KAFLAGS", "KCPPFLAGS", "LOCALVERSION", "HOSTCFLAGS"]
    foreign += ["LDFLAGS_vmlinux", "CFLAGS_MODULE", "INSTALL_MOD_DIR", "KBUILD_BUILD_TIMESTAMP"]
    for name in (*foreign, "CC", "W", "C", "DEPMOD", "CONFIG_SHELL", "MAKEFILES", "LANG"):
        monkeypatch.setenv(name, "/foreign")
    monkeypatch.setenv("CCACHE_DIR", "/ccache")
    makefile = tree / "Makefile"
    makefile.write_text(
        makefile.read_text().replace("allnoconfig:\n", "allnoconfig:\n\t@env > $(O)/environment\n")
    )
    built = kbuild.build_tree(cache, tree)
    text = (built.vmlinux.parent / "objects/environment").read_text()
    assert "/foreign" not in text
    assert "CCACHE_DIR=/ccache\n" in text
    (line,) = (line for line in caplog.messages if line.startswith("not passed on"))
    names = set(line.removesuffix(" of the environment").partition(": ")[2].split(", "))
    assert names == set(foreign)


def test_a_forced_command_line_is_switched_off(
    tree: Path, cache: Cache, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = tmp_path / "config"
    own.write_text('CONFIG_CMDLINE="quiet"\nCONFIG_CMDLINE_FORCE=y\n')
    produced = parse_config(kbuild.build_tree(cache, tree, config=own).config.read_text())
    assert produced["CMDLINE"] == '"quiet"'
    assert "CMDLINE_FORCE" not in produced
    assert f"CONFIG_CMDLINE_FORCE of {own} is switched off" in caplog.text


def test_missing_host_packages_are_named_before_the_compilation(
    tree: Path, cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "config"
    own.write_text("CONFIG_OBJTOOL=y\nCONFIG_DEBUG_INFO_BTF=y\n")
    monkeypatch.setattr(prerequisites._Need, "is_met", lambda need: need.part == "zlib.h")
    with pytest.raises(HostError) as caught:
        kbuild.build_tree(cache, tree, config=own)
    assert caught.value.message == (
        "this machine lacks tools or headers for the kernel's configuration: "
        "gelf.h (for CONFIG_OBJTOOL, CONFIG_DEBUG_INFO_BTF), pahole (for CONFIG_DEBUG_INFO_BTF)"
    )
    assert caught.value.hint == (
        "apt install libelf-dev dwarves (Fedora: dnf install elfutils-libelf-devel dwarves), "
        "or switch the options off"
    )
    calls = next((cache.root / kbuild.TREE).glob("*/objects/calls")).read_text().split()
    assert calls == ["olddefconfig"]


def test_programs_and_headers_of_the_host_are_found() -> None:
    def is_met(part: str) -> bool:
        return prerequisites._Need("X", part, "debian", "fedora", "no-such-library").is_met()

    assert (is_met("make"), is_met("no-such-tool")) == (True, False)
    assert (is_met("stdio.h"), is_met("no/such.h")) == (True, False)


def test_keys_of_a_distribution(tmp_path: Path) -> None:
    for name in ("", "certs/signing_key.pem", "pkcs11:token=x"):
        prerequisites.require_prerequisites(
            {"MODULE_SIG_KEY": f'"{name}"', "SYSTEM_TRUSTED_KEYS": '""'}, tmp_path
        )
    produced = {"SYSTEM_TRUSTED_KEYS": '"debian/certs/uefi.pem"'}
    with pytest.raises(ConfigError, match=r"SYSTEM_TRUSTED_KEYS names debian/certs/uefi\.pem"):
        prerequisites.require_prerequisites(produced, tmp_path)
    (tmp_path / "debian/certs").mkdir(parents=True)
    (tmp_path / "debian/certs/uefi.pem").touch()
    prerequisites.require_prerequisites(produced, tmp_path)


def test_own_config_keeps_modules_and_gets_the_required_options(
    tree: Path, cache: Cache, tmp_path: Path
) -> None:
    own = tmp_path / "config"
    own.write_text("CONFIG_PAPR_SCM=m\nCONFIG_HZ_100=y\n# CONFIG_FS_DAX is not set\n")
    built = kbuild.build_tree(cache, tree, config=own)
    produced = parse_config(built.config.read_text())
    assert produced["PAPR_SCM"] == "m"
    assert produced["FS_DAX"] == "y"
    assert produced["HZ_100"] == "y"
    assert "HZ_250" not in produced
    assert built.modules is not None
    assert (built.modules / "lib/modules/6.0/kernel/xfs.ko").is_file()
    assert not (built.modules / "lib/modules/6.0/build").is_symlink()
    calls = (built.vmlinux.parent / "objects/calls").read_text().split()
    # Two goals of one parallel make, in either order.
    assert (calls[0], sorted(calls[1:])) == ("olddefconfig", ["modules", "vmlinux"])


def test_second_build_uses_the_same_folder(tree: Path, cache: Cache) -> None:
    first = kbuild.build_tree(cache, tree)
    (first.vmlinux.parent / "objects/kept").touch()
    second = kbuild.build_tree(cache, tree)
    assert first.vmlinux == second.vmlinux
    assert (first.vmlinux.parent / "objects/kept").exists()


def test_compiler_error_is_in_the_message(tree: Path, cache: Cache) -> None:
    (tree / "FAIL").touch()
    with pytest.raises(ConfigError, match=r"mm/fail\.c:7:3: error: 'x' undeclared") as caught:
        kbuild.build_tree(cache, tree)
    assert "***" not in caught.value.message
    log_file = Path(str(caught.value.hint).rpartition(" ")[2])
    assert "undeclared" in log_file.read_text()
    (tree / "FAIL").unlink()
    kbuild.build_tree(cache, tree)


def test_vital_option_that_is_lost_is_named_with_the_reason(tree: Path, cache: Cache) -> None:
    (tree / "DROP").write_text("CONFIG_PAPR_SCM=\\|CONFIG_MEMORY_HOTPLUG=")
    with pytest.raises(ConfigError, match=r"CONFIG_PAPR_SCM \(depends on MEMORY_HOTPLUG, not set"):
        kbuild.build_tree(cache, tree)


def test_other_option_that_is_lost_is_only_warned_of(
    tree: Path, cache: Cache, caplog: pytest.LogCaptureFixture
) -> None:
    (tree / "DROP").write_text("CONFIG_HCALL_STATS=")
    kbuild.build_tree(cache, tree)
    assert "CONFIG_HCALL_STATS (this kernel has no such option)" in caplog.text


@pytest.mark.parametrize("dirt", [".config", "include/config", "arch/powerpc/include/generated"])
def test_tree_that_was_built_in_place(tree: Path, cache: Cache, dirt: str) -> None:
    (tree / dirt).parent.mkdir(parents=True, exist_ok=True)
    (tree / dirt).touch()
    with pytest.raises(ConfigError, match="was built or configured in place") as caught:
        kbuild.build_tree(cache, tree)
    assert "mrproper" in str(caught.value.hint)


def test_no_tree(cache: Cache, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not the top of a Linux source tree"):
        kbuild.build_tree(cache, tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot be read"), ("hello\n", "is not a kernel configuration")],
)
def test_bad_own_config(
    tree: Path, cache: Cache, tmp_path: Path, content: str | None, message: str
) -> None:
    own = tmp_path / "config"
    if content is not None:
        own.write_text(content)
    with pytest.raises(ConfigError, match=message):
        kbuild.build_tree(cache, tree, config=own)


def test_missing_compiler_is_named(
    tree: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(HostError, match="powerpc64le-linux-gnu-gcc is not installed") as caught:
        kbuild.build_tree(cache, tree)
    assert "apt install gcc-powerpc64le-linux-gnu" in str(caught.value.hint)


def test_incomplete_objects_of_a_killed_build_are_removed(tree: Path, cache: Cache) -> None:
    objects = kbuild.build_tree(cache, tree).vmlinux.parent / "objects"
    past = time.time() - 100

    def compiled(name: str, *, at: float, command: bool, dependencies: bool = False) -> Path:
        path = objects / f"{name}.o"
        path.touch()
        if command:
            (objects / f".{name}.o.cmd").touch()
            os.utime(objects / f".{name}.o.cmd", (at, at))
        if dependencies:
            (objects / f".{name}.o.d").touch()
        os.utime(path, (at, at))
        return path

    old = compiled("old", at=past - 50, command=False)
    whole = compiled("whole", at=past + 10, command=True)
    half = compiled("half", at=past + 10, command=False)
    again = compiled("again", at=past + 10, command=True, dependencies=True)
    (objects / ".building").touch()
    os.utime(objects / ".building", (past, past))
    kbuild.build_tree(cache, tree)
    assert (old.exists(), whole.exists(), half.exists(), again.exists()) == (
        True,
        True,
        False,
        False,
    )
    assert not (objects / ".building").exists()


def make_package(tree: Path, target: Path) -> None:
    """Create the files of Debian's source package."""
    (tree / "arch/x86/kernel").mkdir(parents=True, exist_ok=True)
    (tree / "arch/x86/kernel/setup.c").touch()
    (tree / "arch/x86/Kconfig").touch()
    (tree / "drivers/gpu/drm").mkdir(parents=True, exist_ok=True)
    (tree / "drivers/gpu/drm/drm.c").touch()
    (tree / "drivers/gpu/drm/Makefile").touch()
    (target / "usr/src").mkdir(parents=True)
    with (
        lzma.open(target / "usr/src/linux-source-6.0.tar.xz", "wb", preset=0) as packed,
        tarfile.open(fileobj=packed, mode="w") as archive,
    ):
        archive.add(tree, "linux-source-6.0")
    documents = target / "usr/share/doc/linux-source-6.0"
    documents.mkdir(parents=True)
    text = b"linux (6.0.1-2) unstable; urgency=medium\n"
    (documents / "changelog.Debian.gz").write_bytes(gzip.compress(text))


@pytest.fixture
def fetched(tree: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace the download; the list has the downloaded packages."""
    names: list[str] = []

    def download(_: Archive, packages: list[str], *, suite: str, **__: object) -> Download:
        if suite == "trixie":
            raise UnavailableError(f"trixie has no package {packages[0]}")
        names.extend(packages)
        return Download(suite, tree / "nowhere", ())

    def unpack(_: Download, target: Path, *, title: str) -> None:
        make_package(tree, target)

    monkeypatch.setattr(Archive, "download", download)
    monkeypatch.setattr(Download, "unpack", unpack)
    return names


def settings(page_size: str = "64k", kernel: str = "default") -> Settings:
    """Settings with a source package of the fixture's name."""
    return Settings(kernel_source="linux-source-6.0", page_size=page_size, kernel=kernel)


def test_default_kernel_is_fetched_and_built_once(cache: Cache, fetched: list[str]) -> None:
    first = kbuild.build_default(Archive(cache), settings())
    second = kbuild.build_default(Archive(cache), settings())
    assert first == second
    assert fetched == ["linux-source-6.0"]
    assert first.source == "6.0.1-2"
    names = sorted(path.name for path in first.vmlinux.parent.iterdir())
    assert names == [
        *("build.log", "config", "fragment", "manifest.json", "source-version", "vmlinux"),
    ]
    assert "CC      mm/1.o" in first.log.read_text()
    assert parse_config(first.config.read_text())["PPC_64K_PAGES"] == "y"


def test_kernel_of_another_machine(
    cache: Cache, fetched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An imported kernel is used unchanged: without its source, without a compiler."""
    first = kbuild.build_default(Archive(cache), settings())
    (source,) = (entry for entry in cache.entries() if entry.kind == "kernel-source")
    monkeypatch.setattr(kbuild, "_compiler", lambda: "another one")
    cache.remove(source.path)
    assert kbuild.build_default(Archive(cache), settings()) == first
    assert len(fetched) == 1
    # But not with an explicit suite, and not for another configuration.
    bookworm = dataclasses.replace(settings(), kernel_suite="bookworm")
    assert kbuild.build_default(Archive(cache), bookworm) != first
    offline = dataclasses.replace(bookworm, kernel_suite="sid", offline=True)
    assert kbuild.build_default(Archive(cache), offline).source == first.source
    other = dataclasses.replace(settings(), page_size="4k")
    assert kbuild.build_default(Archive(cache), other).vmlinux != first.vmlinux


def test_another_fragment_is_another_kernel_of_the_same_source(
    cache: Cache, fetched: list[str], tmp_path: Path
) -> None:
    first = kbuild.build_default(Archive(cache), settings())
    extra = tmp_path / "extra.config"
    extra.write_text("CONFIG_XFS_FS=m\n# CONFIG_NUMA is not set\n")
    second = kbuild.build_default(Archive(cache), settings(), extra=[extra])
    assert first.vmlinux != second.vmlinux
    assert len(fetched) == 1
    assert parse_config(second.config.read_text())["XFS_FS"] == "m"
    assert second.modules is not None


def test_patches_are_applied_to_the_source_and_the_next_build_has_others(
    cache: Cache, fetched: list[str], tmp_path: Path
) -> None:
    plain = kbuild.build_default(Archive(cache), settings())
    text = "--- a/Makefile\n+++ b/Makefile\n@@ -1,2 +1,2 @@\n"
    text += "-CC := powerpc64le-linux-gnu-gcc\n+CC := powerpc64le-linux-gnu-gcc -DPATCHED\n"
    text += " V := $(O)/.config\n"
    fix, broken = tmp_path / "fix.patch", tmp_path / "broken.patch"
    fix.write_text(text)
    broken.write_text("--- /dev/null\n+++ b/FAIL\n@@ -0,0 +1 @@\n+now\n")
    patched = kbuild.build_default(Archive(cache), settings(), patches=[fix])
    assert patched.vmlinux != plain.vmlinux
    tree = patched.vmlinux.parent / "tree"
    assert "PATCHED" in (tree / "Makefile").read_text()
    # The patch's author is to blame, not the host.
    with pytest.raises(ConfigError, match=r"'x' undeclared"):
        kbuild.build_default(Archive(cache), settings(), patches=[broken])
    assert "PATCHED" not in (tree / "Makefile").read_text()
    assert kbuild.build_default(Archive(cache), settings(), patches=[fix]) == patched
    assert not (tree / "FAIL").exists()
    assert kbuild.build_default(Archive(cache), settings()) == plain
    assert len(fetched) == 1


def test_small_pages_are_another_kernel_of_the_same_source(
    cache: Cache, fetched: list[str]
) -> None:
    large = kbuild.build_default(Archive(cache), settings())
    small = kbuild.build_default(Archive(cache), settings(page_size="4k"))
    assert large.vmlinux != small.vmlinux
    assert len(fetched) == 1
    produced = {built.vmlinux: parse_config(built.config.read_text()) for built in (large, small)}
    assert produced[small.vmlinux].pop("PPC_4K_PAGES") == "y"
    assert produced[large.vmlinux].pop("PPC_64K_PAGES") == "y"
    # Nothing else differs, the MMU least of all.
    assert produced[small.vmlinux] == produced[large.vmlinux]
    assert produced[small.vmlinux]["PPC_RADIX_MMU_DEFAULT"] == "y"
    assert kbuild.build_default(Archive(cache), settings(page_size="4k")) == small


def test_small_pages_of_an_own_tree(tree: Path, cache: Cache, tmp_path: Path) -> None:
    large = kbuild.build_tree(cache, tree)
    small = kbuild.build_tree(cache, tree, page_size="4k")
    assert large.vmlinux != small.vmlinux
    assert parse_config(small.config.read_text())["PPC_4K_PAGES"] == "y"
    assert parse_config(large.config.read_text())["PPC_64K_PAGES"] == "y"
    own = tmp_path / "config"
    own.write_text("CONFIG_PAPR_SCM=m\n")
    with pytest.raises(ConfigError, match="page_size=4k applies to the suite's own configuration"):
        kbuild.build_tree(cache, tree, config=own, page_size="4k")


@pytest.mark.parametrize("page_size", ["64k", "4k"])
def test_debug_kernel_differs_in_its_own_options_only(
    cache: Cache, fetched: list[str], page_size: str
) -> None:
    plain = kbuild.build_default(Archive(cache), settings(page_size))
    debug = kbuild.build_default(Archive(cache), settings(page_size, "debug"))
    assert debug.vmlinux != plain.vmlinux
    assert len(fetched) == 1
    before = parse_config(plain.config.read_text())
    after = parse_config(debug.config.read_text())
    added = {name: value for name, value in after.items() if name not in before}
    assert before.items() <= after.items()
    fragment = Fragment.read([default_fragment().with_name("kernel-debug.config")])
    own = fragment.values(own_tree=False)
    assert added == {name: value for name, value in own.items() if value != "n"}
    assert {"DEBUG_ATOMIC_SLEEP", "PROVE_LOCKING", "DEBUG_LIST", "FAILSLAB"} <= set(added)
    assert kbuild.build_default(Archive(cache), settings(page_size, "debug")) == debug


def test_debug_kernel_of_an_own_tree(tree: Path, cache: Cache, tmp_path: Path) -> None:
    kinds = [(size, debug) for size in ("64k", "4k") for debug in (False, True)]
    built = [kbuild.build_tree(cache, tree, page_size=size, debug=debug) for size, debug in kinds]
    assert len({one.vmlinux for one in built}) == 4
    produced = [parse_config(one.config.read_text()) for one in built]
    flags = [("PPC_4K_PAGES" in one, "PROVE_LOCKING" in one) for one in produced]
    assert flags == [(size == "4k", debug) for size, debug in kinds]
    own = tmp_path / "config"
    own.write_text("CONFIG_PAPR_SCM=m\n")
    with pytest.raises(ConfigError, match="kernel=debug applies to the suite's own configuration"):
        kbuild.build_tree(cache, tree, config=own, debug=True)


def test_fragments_come_in_order() -> None:
    names = [path.name for path in fragments("4k", debug=True)]
    assert names == ["kernel.config", "kernel-4k.config", "kernel-debug.config"]
    assert [path.name for path in fragments("64k")] == ["kernel.config"]


def test_default_kernel_insists_on_every_option(
    cache: Cache, fetched: list[str], tree: Path
) -> None:
    (tree / "DROP").write_text("CONFIG_HCALL_STATS=")
    with pytest.raises(ConfigError, match=r"lacks required options: CONFIG_HCALL_STATS"):
        kbuild.build_default(Archive(cache), settings())
    assert fetched
    assert cache.entries()[0].kind == "kernel-source"
    assert not list((cache.root / "kernel").glob("*"))


def test_failed_default_build_keeps_its_log(cache: Cache, fetched: list[str], tree: Path) -> None:
    (tree / "FAIL").touch()
    with pytest.raises(HostError, match="'x' undeclared") as caught:
        kbuild.build_default(Archive(cache), settings())
    assert "undeclared" in Path(str(caught.value.hint).rpartition(" ")[2]).read_text()
    assert fetched


def test_unpacking_skips_files_that_powerpc_does_not_need(
    cache: Cache, fetched: list[str], tmp_path: Path
) -> None:
    kbuild.build_default(Archive(cache), settings())
    archive = next((cache.root / "kernel-source").glob("*/linux.tar.xz"))
    kernel_source.unpack_source(archive, tmp_path / "unpacked")
    names = {str(p.relative_to(tmp_path / "unpacked")) for p in (tmp_path / "unpacked").rglob("*")}
    assert {"Makefile", "arch/powerpc/Kconfig", "arch/x86/Kconfig", "drivers/gpu/drm/Makefile"} < (
        names
    )
    assert not {"arch/x86/kernel/setup.c", "drivers/gpu/drm/drm.c"} & names
    assert fetched


def test_fragment_in_the_project_is_sound() -> None:
    fragment = Fragment.read([default_fragment()])
    assert fragment.objects > 500
    every, own = (fragment.values(own_tree=own_tree) for own_tree in (False, True))
    assert {"PAPR_SCM", "BLK_DEV_PMEM", "LIBNVDIMM", "FS_DAX"} <= set(own)
    assert "PPC_64K_PAGES" in every
    assert "PPC_64K_PAGES" not in own


def test_each_option_in_the_project_has_a_reason() -> None:
    for path in sorted(default_fragment().parent.glob("*.config")):
        reason = False
        for line in path.read_text().splitlines():
            assert reason or not line.startswith("CONFIG_"), f"{path.name}: {line}"
            # A comment covers the options after it, up to an empty line.
            reason = bool(line) and (reason or (line.startswith("# ") and "SPDX" not in line))


def test_fragment_lines(tmp_path: Path) -> None:
    path = tmp_path / "fragment"
    path.write_text(
        "# why\n#@ objects 12\n#@ default kernel\nCONFIG_A=y\n# CONFIG_B is not set\n"
        '#@ every kernel\nCONFIG_C="text"\n'
    )
    fragment = Fragment.read([path])
    assert fragment.values(own_tree=False) == {"A": "y", "B": "n", "C": '"text"'}
    assert fragment.values(own_tree=True) == {"C": '"text"'}
    assert fragment.objects == 12
    assert fragment.text(own_tree=True) == 'CONFIG_C="text"\n'
    assert "# CONFIG_B is not set\n" in fragment.text(own_tree=False)
    other = tmp_path / "other"
    other.write_text("CONFIG_A=m\n# CONFIG_B is not set\n")
    assert Fragment.read([path, other]).values(own_tree=False)["A"] == "m"
    assert Fragment.read([path, other]).digest != fragment.digest


def test_fragment_alternatives(tmp_path: Path) -> None:
    path = tmp_path / "fragment"
    path.write_text(
        "CONFIG_A=y or # CONFIG_B is not set or CONFIG_C=y\n"
        "CONFIG_D=y or nothing\n"
        'CONFIG_E="this or nothing"\n'
        "# Option CONFIG_F or CONFIG_G=y\n"
    )
    first, second, third = Fragment.read([path]).required(own_tree=True)
    assert (first.options, first.optional) == ({"A": "y", "B": "n", "C": "y"}, False)
    assert (second.options, second.optional) == ({"D": "y"}, True)
    assert (third.options, third.optional) == ({"E": '"this or nothing"'}, False)
    # kconfig uses the last of several options of one choice.
    assert Fragment.read([path]).text(own_tree=True).splitlines()[:3] == [
        "CONFIG_C=y",
        "# CONFIG_B is not set",
        "CONFIG_A=y",
    ]
    later = tmp_path / "later"
    later.write_text("CONFIG_A=m\n")
    assert Fragment.read([path, later]).required(own_tree=True)[0].options == {"A": "m"}


@pytest.mark.parametrize(
    "line",
    [
        "CONFIG_A",
        "config A=y",
        "#@ nonsense",
        "#@ objects many",
        "CONFIG_A=y or B",
        "CONFIG_A=y or nothing or CONFIG_B=y",
        "nothing",
    ],
)
def test_bad_fragment_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "fragment"
    path.write_text(f"# first\n{line}\n")
    with pytest.raises(ConfigError, match=r"fragment:2: "):
        Fragment.read([path])


def test_merge() -> None:
    base = "# head\nCONFIG_A=m\nCONFIG_B=y\n# CONFIG_C is not set\nCONFIG_AB=y\n"
    merged = kconfig.merge(base, {"A": "y", "B": "n", "C": "y", "D": "4"})
    assert parse_config(merged) == {"A": "m", "AB": "y", "C": "y", "D": "4"}
    assert "# CONFIG_B is not set\n" in merged
    assert merged.count("CONFIG_C") == 1


def test_unmet() -> None:
    required = [
        Requirement(options)
        for options in (
            *({"A": "y"}, {"B": "y"}, {"C": "m"}, {"D": "n"}, {"E": "n"}),
            *({"B": "y", "D": "y"}, {"D": "n", "F": "y"}),
        )
    ]
    lost = kconfig.unmet(required, {"A": "m", "C": "y", "D": "y"})
    assert lost == [required[1], required[2], required[3], required[6]]


def test_lost_alternatives_are_named_together(tree: Path) -> None:
    either = [Requirement({"PAPR_SCM": "y", "OTHER": "y"})]
    for produced in ({"PAPR_SCM": "m"}, {"OTHER": "y"}):
        kbuild._check(either, produced, tree, vital=None)
    with pytest.raises(
        ConfigError,
        match=r"options: CONFIG_PAPR_SCM \(depends on PPC_PSERIES, MEMORY_HOTPLUG, not set\) or "
        r"CONFIG_OTHER \(this kernel has no such option\)$",
    ):
        kbuild._check(either, {}, tree, vital=None)


def test_or_nothing_is_for_kernels_without_the_option(
    tree: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kbuild._check([Requirement({"GADGET": "y"}, optional=True)], {}, tree, vital=[])
    kbuild._check([Requirement({"GADGET": "y"}, optional=True)], {}, tree, vital=None)
    assert not caplog.records
    with pytest.raises(ConfigError, match=r"CONFIG_PAPR_SCM \(depends on PPC_PSERIES"):
        kbuild._check([Requirement({"PAPR_SCM": "y"}, optional=True)], {}, tree, vital=None)


_CONFIGURATION = ("*/Kconfig*", "*/Kbuild*", "*/Makefile*", "*/scripts/*", "*/arch/powerpc/*")


@pytest.mark.slow
@pytest.mark.parametrize("version", ["6.1", "6.12", "7.2"])
def test_every_requirement_is_met(version: str, tmp_path: Path) -> None:
    """Configure the sources of Debian's suites that an earlier build has fetched."""
    entries = Cache(Settings().cache_dir).entries()
    packages = {one.fields.get("package"): one for one in entries if one.kind == "kernel-source"}
    source = packages.get(f"linux-source-{version}")
    if source is None:
        pytest.skip(f"linux-source-{version} was not fetched")
    tree = tmp_path / "tree"
    tree.mkdir()
    process.run(
        [
            *("tar", "--use-compress-program=xz -T0", "-xf", source.path / "linux.tar.xz"),
            *("-C", tree, "--strip-components=1", "--wildcards", "--no-same-owner"),
            *_CONFIGURATION,
        ]
    )
    # The preferred option comes last in the fragment; kconfig must choose it.
    choice = tmp_path / "choice"
    choice.write_text("CONFIG_HZ_100=y or CONFIG_HZ_300=y\n")

    def configure(paths: Sequence[Path]) -> dict[str, str]:
        fragment = Fragment.read(paths)
        objects = tmp_path / "objects"
        make = Make(tree, objects, tmp_path / "log")
        (objects / "fragment").write_text(fragment.text(own_tree=False))
        make.run("allnoconfig", f"KCONFIG_ALLCONFIG={objects / 'fragment'}")
        produced = parse_config((objects / ".config").read_text())
        kbuild._check(fragment.required(own_tree=False), produced, tree, vital=None)
        return produced

    for page_size, debug in (("64k", False), ("4k", False), ("64k", True)):
        configure(fragments(page_size, debug=debug))
    modular = default_fragment().with_name("kernel-modular.config")
    configure([default_fragment(), modular])
    assert "HZ_100" in configure([choice])


def test_explain(tmp_path: Path) -> None:
    (tmp_path / "Kconfig").write_text(
        'config A\n\tbool "a"\n\tdepends on B && !C && D=y\n\thelp\n\t  depends on X\n\n'
        'config E\n\tbool\n\nconfig F\n\tbool\n\tprompt "f"\n'
    )
    reasons = kconfig.explain(["A", "E", "F", "G"], {"D": "y"}, tmp_path)
    assert reasons["A"] == "depends on B, not set"
    assert reasons["E"] == "it cannot be set directly, other options select it"
    assert reasons["F"] == "it became n"
    assert reasons["G"] == "this kernel has no such option"
