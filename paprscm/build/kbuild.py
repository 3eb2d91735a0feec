# SPDX-License-Identifier: GPL-2.0-or-later
"""Build guest kernels from Debian's source, or from an own source tree."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from paprscm.build.kconfig import (
    NO_SUCH_OPTION,
    Fragment,
    Requirement,
    explain,
    fragments,
    merge,
    unmet,
)
from paprscm.build.make import Make, marked
from paprscm.build.patches import in_words, set_patches
from paprscm.build.vmlinux import parse_config
from paprscm.debian import kernel_source, prerequisites, toolchain
from paprscm.debian.packages import Archive
from paprscm.errors import ConfigError, HostError
from paprscm.host import process
from paprscm.host.cache import Cache
from paprscm.host.folders import require_make
from paprscm.log import logger, step
from paprscm.settings import Settings, expanded

# Without these options no test is possible.
_VITAL = ("PAPR_SCM", "LIBNVDIMM", "BLK_DEV_PMEM")
# Switched off in the user's .config: a guest needs the command line that QEMU passes.
_OFF = {"CMDLINE_FORCE": "n"}
# Kind of the cache's workspaces with the objects of own trees.
TREE = "kernel-tree"
PATCHED = "patched-kernel"
# Disk space of the unpacked source, the objects and the vmlinux.
_BUILD_BYTES = 1_200_000_000


@dataclass(frozen=True)
class BuiltKernel:
    """A built kernel.

    Attributes:
        vmlinux: without debug information, with its symbol table.
        config: its .config.
        log: output of make.
        modules: INSTALL_MOD_PATH of modules_install; None if there are no modules.
        source: version of Debian's source package, or the source folder.
    """

    vmlinux: Path
    config: Path
    log: Path
    modules: Path | None
    source: str


def build_default(
    archive: Archive,
    settings: Settings,
    *,
    extra: Sequence[Path] = (),
    patches: Sequence[Path] = (),
    proceed: Callable[[], None] = lambda: None,
) -> BuiltKernel:
    """The default or debug kernel; built if it is not in the cache.

    Args:
        archive: the mirror of the source; its cache keeps source and kernel, as two entries.
        settings: kernel_source and kernel_suite select the source, page_size the page size, kernel
            the debug kernel.
        extra: additional fragments; a later one overrides.
        patches: applied to the source. Such a kernel is built incrementally, in one folder of the
            cache for all patches: the next one replaces it.
        proceed: called several times a second; may raise to end the build.

    Raises:
        HostError: a tool is missing, or the source does not compile.
        ConfigError: options of the fragments are not set, with the reasons; or a patch does not
            apply or compile.
    """
    cache = archive.cache
    debug = settings.kernel == "debug"
    fragment = Fragment.read([*fragments(settings.page_size, debug=debug), *extra])
    source = kernel_source.find_source(cache, settings)
    any_source = source is None and (settings.kernel_suite == "auto" or settings.offline)
    if not patches and (any_source or shutil.which(toolchain.PREFIX + "gcc") is None):
        # A kernel imported from another machine.
        cached = _find_without_source(cache, settings, fragment)
        if cached is not None:
            return cached
    # Before the download, to report a missing tool at once.
    compiler = _compiler()
    if source is None:
        require_make(cache.root)
    source = source or kernel_source.fetch_source(archive, settings, proceed)
    version = (source / "version").read_text().strip()
    fields = {"source": version, "fragment": fragment.digest, "compiler": compiler}
    # Not in the entry, which goes when the build fails.
    log_file = cache.root / "logs" / f"kernel-{cache.key(fields)}.log"

    def unpack(tree: Path) -> None:
        kernel_source.unpack_source(source / kernel_source.ARCHIVE, tree)

    def compile_tree(folder: Path) -> None:
        tree, objects = folder / "tree", folder / "objects"
        make = Make(tree, objects, log_file, "LOCALVERSION=-paprscm", proceed=proceed)
        (folder / "fragment").write_text(fragment.text(own_tree=False))
        make.run("allnoconfig", f"KCONFIG_ALLCONFIG={folder / 'fragment'}")
        produced = parse_config((objects / ".config").read_text())
        _check(fragment.required(own_tree=False), produced, tree, vital=None)
        prerequisites.require_prerequisites(produced, tree)
        blame = ConfigError if patches else HostError
        make.compile(produced, total=fragment.objects, blame=blame)
        _collect(make, folder, produced)
        (folder / "source-version").write_text(version + "\n")
        shutil.copyfile(log_file, folder / "build.log")

    def build(entry: Path) -> None:
        with step(f"building the {settings.kernel} kernel ({version})"):
            _fresh_log(log_file)
            unpack(entry / "tree")
            compile_tree(entry)
            shutil.rmtree(entry / "tree")
            shutil.rmtree(entry / "objects")

    if patches:
        with cache.workspace(PATCHED, fields, purpose="builds a patched kernel") as folder:
            set_patches(folder, unpack, patches)
            with step(
                f"building the {settings.kernel} kernel ({version}) with {in_words(patches)}"
            ):
                _fresh_log(log_file)
                with marked(folder / "objects"):
                    compile_tree(folder)
        return _built(folder, folder / "build.log", version)
    entry = cache.ensure("kernel", fields, build, needs_bytes=_BUILD_BYTES)
    return _built(entry.path, entry.path / "build.log", version)


def build_tree(
    cache: Cache,
    source: Path,
    *,
    config: Path | None = None,
    page_size: str = "64k",
    debug: bool = False,
) -> BuiltKernel:
    """Build the kernel of an own source tree incrementally, in an O= folder of the cache.

    The options of images/kernel.config for every kernel are merged over `config`; an option that
    is a module there stays one. Without `config`, the default kernel's configuration is used.

    Args:
        cache: keeps the O= folder, as a workspace.
        source: top of a Linux source tree without an in-tree build.
        config: the user's .config.
        page_size, debug: kind of the kernel without `config`, as for `fragments`; each kind has
            its own O= folder.

    Raises:
        ConfigError: the tree is not a clean kernel tree, has no papr_scm, or does not compile (with
            the compiler's first errors); or `page_size` or `debug` was given with `config`.
        HostError: a tool is missing.
    """
    source = expanded(source).resolve()
    _check_tree(source)
    if config is not None and (debug or page_size != "64k"):
        option = "kernel=debug" if debug else f"page_size={page_size}"
        raise ConfigError(
            f"{option} applies to the suite's own configuration only",
            hint=f"set it in {config}",
        )
    fragment = Fragment.read(fragments(page_size, debug=debug))
    kind = f"{page_size}, debug" if debug else page_size
    fields = {"source": str(source), "configuration": kind}
    with cache.workspace(TREE, fields, purpose=f"builds the kernel in {source}") as folder:
        objects, log_file = folder / "objects", folder / "build.log"
        with step(f"building the kernel of {source}"), marked(objects):
            _fresh_log(log_file)
            make = Make(source, objects, log_file)
            if config is None:
                (folder / "fragment").write_text(fragment.text(own_tree=False))
                make.run("allnoconfig", f"KCONFIG_ALLCONFIG={folder / 'fragment'}")
            else:
                user_config = _read_config(config)
                text = merge(user_config, {**fragment.values(own_tree=True), **_OFF})
                (objects / ".config").write_text(text)
                make.run("olddefconfig")
            produced = parse_config((objects / ".config").read_text())
            required = fragment.required(own_tree=config is not None)
            _check(required, produced, source, vital=_VITAL)
            if config is not None:
                _report_switched_off(parse_config(user_config), produced, config)
            prerequisites.require_prerequisites(produced, source)
            count = folder / "objects-count"
            recorded = count.read_text() if count.is_file() else ""
            total = int(recorded or fragment.objects) if config is None else int(recorded or 0)
            first = not (objects / "vmlinux").exists()
            compiled = make.compile(produced, total=total if first else 0, blame=ConfigError)
            if first:
                count.write_text(str(compiled))
            _collect(make, folder, produced)
    return _built(folder, log_file, str(source))


def _find_without_source(
    cache: Cache, settings: Settings, fragment: Fragment
) -> BuiltKernel | None:
    """The newest kernel in the cache of this source series, built by any compiler."""
    series = kernel_source.series(settings) + "."
    entries = [
        entry
        for entry in cache.entries("kernel")
        if entry.fields.get("fragment") == fragment.digest
        and entry.fields.get("source", "").startswith(series)
    ]
    for entry in sorted(entries, key=lambda entry: entry.created, reverse=True):
        if cached := cache.find(entry.kind, entry.fields):
            return _built(cached.path, cached.path / "build.log", entry.fields["source"])
    return None


def _compiler() -> str:
    """The cross compiler's name and version, as one line."""
    compiler = toolchain.require_program(f"{toolchain.PREFIX}gcc")
    for tool in toolchain.KERNEL_TOOLS:
        toolchain.require_program(tool)
    return process.run([compiler, "--version"]).lines[0]


def _check(
    required: Sequence[Requirement],
    produced: dict[str, str],
    tree: Path,
    *,
    vital: Sequence[str] | None,
) -> None:
    """Report unmet requirements; raise for vital options, for all of them if `vital` is None."""
    missing = unmet(required, produced)
    if not missing:
        return
    reasons = explain([name for one in missing for name in one.options], produced, tree)
    missing = [
        one
        for one in missing
        if not one.optional or any(reasons[name] != NO_SUCH_OPTION for name in one.options)
    ]
    text = "; ".join(
        " or ".join(f"CONFIG_{name} ({reasons[name]})" for name in one.options) for one in missing
    )
    if any(vital is None or name in vital for one in missing for name in one.options):
        raise ConfigError(f"the kernel's configuration lacks required options: {text}")
    if missing:
        logger.warning("the kernel's configuration lacks options that tests may need: %s", text)


def _report_switched_off(requested: dict[str, str], produced: dict[str, str], config: Path) -> None:
    """Warn about options of the user's .config that the build has switched off."""
    for name, reason in (
        ("CMDLINE_FORCE", "guests need the command line that QEMU passes"),
        # "depends on PAHOLE_VERSION >= 116", Linux lib/Kconfig.debug.
        ("DEBUG_INFO_BTF", "pahole is missing or too old (apt install dwarves)"),
    ):
        if requested.get(name) == "y" and name not in produced:
            logger.warning("CONFIG_%s of %s is switched off: %s", name, config, reason)


def _check_tree(source: Path) -> None:
    if not (source / "Kbuild").is_file() or not (source / "arch/powerpc/Kconfig").is_file():
        raise ConfigError(
            f"{source} is not the top of a Linux source tree",
            hint="it must hold Kbuild and arch/powerpc/Kconfig",
        )
    # Linux, Makefile: outputmakefile.
    dirt = (".config", "include/config", "arch/powerpc/include/generated")
    leftovers = [name for name in dirt if (source / name).exists()]
    if leftovers:
        raise ConfigError(
            f"{source} was built or configured in place ({', '.join(leftovers)} is there); "
            "kbuild refuses a separate output folder then",
            hint=f"cp {source}/.config FILE; make -C {source} ARCH=powerpc mrproper; then give "
            "FILE as the configuration",
        )
    _compiler()


def _read_config(path: Path) -> str:
    try:
        text = expanded(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the kernel configuration {path} cannot be read: {error}") from error
    if "CONFIG_" not in text:
        raise ConfigError(f"{path} is not a kernel configuration: it sets no CONFIG_ option")
    return text


def _collect(make: Make, folder: Path, produced: dict[str, str]) -> None:
    """Publish vmlinux, config and modules beside the O= folder, each by rename."""
    built = folder / ".vmlinux.new"
    process.run(
        [toolchain.PREFIX + "strip", "--strip-debug", "-o", built, make.objects / "vmlinux"]
    )
    built.replace(folder / "vmlinux")
    shutil.copyfile(make.objects / ".config", folder / "config")
    fresh, modules = folder / ".modules.new", folder / "modules"
    for stale in (fresh, modules):
        shutil.rmtree(stale, ignore_errors=True)
    if "m" in produced.values():
        make.run("modules_install", f"INSTALL_MOD_PATH={fresh}", "INSTALL_MOD_STRIP=1")
        # Links into the build folders, which may be moved or removed.
        for link in fresh.glob("lib/modules/*/*"):
            if link.is_symlink():
                link.unlink()
        fresh.rename(modules)


def _built(folder: Path, log_file: Path, source: str) -> BuiltKernel:
    modules = folder / "modules"
    return BuiltKernel(
        vmlinux=folder / "vmlinux",
        config=folder / "config",
        log=log_file,
        modules=modules if modules.is_dir() else None,
        source=source,
    )


def _fresh_log(log_file: Path) -> None:
    log_file.parent.mkdir(parents=True, exist_ok=True)
    log_file.write_bytes(b"")
