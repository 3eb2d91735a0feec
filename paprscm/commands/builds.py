# SPDX-License-Identifier: GPL-2.0-or-later
"""`paprscm kernel build` and `paprscm qemu build`: what is under test, from source."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from paprscm import log
from paprscm.build.kbuild import build_default, build_tree
from paprscm.commands import manual
from paprscm.debian.packages import Archive
from paprscm.emulator import qemu_build
from paprscm.errors import ConfigError
from paprscm.settings import Settings


def add_verbs(verbs: Any, common: argparse.ArgumentParser) -> None:
    """Add the verbs `kernel build` and `qemu build` to those of `paprscm`."""

    def add(name: str, text: str, built: str, tree: str) -> argparse.ArgumentParser:
        group = verbs.add_parser(name, help=text)
        inner = group.add_subparsers(title="verbs", required=True, metavar="VERB")
        build: argparse.ArgumentParser = inner.add_parser("build", help=built, parents=[common])
        text = f"a {tree} tree; default: Debian's source"
        manual.takes_files(build.add_argument("--source", type=Path, help=text))
        text = "apply this patch to Debian's source; may be repeated"
        patch = build.add_argument("--patch", type=Path, action="append", default=[], help=text)
        manual.takes_files(patch)
        return build

    build = add("kernel", "Build a guest kernel.", "Build a vmlinux.", "kernel")
    build.add_argument("--config", type=Path, help="that tree's .config; default: the suite's own")
    build.set_defaults(verb=_build_kernel)
    text = "Build an emulator; --qemu debian:SUITE selects Debian's source."
    add("qemu", "Build QEMU.", text, "QEMU").set_defaults(verb=_build_qemu)


def _build_kernel(arguments: argparse.Namespace, chosen: Settings) -> int:
    _refuse_patched_tree(arguments)
    archive = Archive.of(chosen)
    if arguments.source is None:
        if arguments.config is not None:
            raise ConfigError("--config without --source", hint="give its source tree, too")
        built = build_default(archive, chosen, patches=arguments.patch)
    else:
        built = build_tree(
            archive.cache,
            arguments.source,
            config=arguments.config,
            page_size=chosen.page_size,
            debug=chosen.kernel == "debug",
        )
    print(built.vmlinux)
    if built.modules is not None:
        log.logger.info("its modules: --modules %s", built.modules)
    return 0


def _build_qemu(arguments: argparse.Namespace, chosen: Settings) -> int:
    _refuse_patched_tree(arguments)
    archive = Archive.of(chosen)
    if arguments.source is None:
        print(qemu_build.build_debian(archive, chosen.qemu, patches=arguments.patch))
    else:
        print(qemu_build.build_tree(archive.cache, arguments.source))
    return 0


def _refuse_patched_tree(arguments: argparse.Namespace) -> None:
    if arguments.source is not None and arguments.patch:
        raise ConfigError(
            "--patch with --source: the tree is yours",
            hint=f"git -C {arguments.source} apply {arguments.patch[0]}",
        )
