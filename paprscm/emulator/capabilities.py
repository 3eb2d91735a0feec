# SPDX-License-Identifier: GPL-2.0-or-later
"""Query a QEMU binary's version and capabilities over QMP, in one short run."""

from __future__ import annotations

import contextlib
import re
import socket
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from elftools.common.exceptions import ELFError
from elftools.elf.dynamic import DynamicSegment
from elftools.elf.elffile import ELFFile
from elftools.elf.segments import InterpSegment
from qemu.qmp import ConnectError

from paprscm.emulator.qmp import Qmp, RefusedError
from paprscm.errors import CapabilityError, ConfigError, Error, GuestLostError, HostError
from paprscm.host.process import Process, describe_status

JSON: TypeAlias = Any
"""A value that json.dumps() accepts and json.loads() returns."""

BINARY = "qemu-system-ppc64"
FORMAT = "3"
"""Version of the value that ask() returns; part of its cache key."""

_ANSWER_LIMIT_S = 20.0
GUEST_TYPES = (
    "spapr-vty",
    "virtio-blk-pci",
    "virtio-net-pci",
    "virtio-rng-pci",
    "virtio-serial-pci",
    "virtserialport",
)
"""Devices of every guest; see argv.qemu_argv."""
QUERIED_TYPES = (
    "spapr-nvdimm",
    "nvdimm",
    "memory-backend-file",
    "memory-backend-memfd",
    "memory-backend-ram",
    "main-loop",
    *GUEST_TYPES,
)
"""Types whose properties are queried. Not qom-list-types: it loads every module in QEMU's built-in
module folder, and a relocated QEMU aborts at the modules of the host's QEMU (assertion in
util/module.c:module_load_dso, seen with 10.0)."""

# Sanitizer runtimes of gcc and clang; each must be the first library that its program loads.
_SANITIZER = re.compile(r"lib(clang_rt\.)?(asan|hwasan|tsan)\b")


def ask(argv_prefix: Sequence[str], path: Path) -> dict[str, JSON]:
    """Return the facts of binary.Qemu that the binary reports; it is started without a machine.

    Args:
        argv_prefix: command-line words that start it.
        path: the binary, for messages.

    Raises:
        ConfigError: it is not a QEMU, or one for another target.
        HostError: it does not start.
        CapabilityError: it has no pseries machine.
    """
    with _monitor(argv_prefix, path) as qmp:
        version = qmp.execute("query-version")
        numbers = version["qemu"]
        target = qmp.execute("query-target")["arch"]
        if target != "ppc64":
            raise ConfigError(f"{path} is a QEMU for {target}, not for ppc64", hint=f"use {BINARY}")
        machines = qmp.execute("query-machines")
        pseries = [m["name"] for m in machines if m.get("alias") == "pseries"]
        if not pseries:
            raise CapabilityError(
                f"{path} has no pseries machine", hint="build it with CONFIG_PSERIES"
            )
        properties = {}
        for name in QUERIED_TYPES:
            # None: the type does not exist in this QEMU.
            items = _execute_or_none(qmp, "qom-list-properties", typename=name)
            if items is not None:
                properties[name] = _names(items)
        machine_type = f"{pseries[0]}-machine"
        properties["machine"] = _names(qmp.execute("qom-list-properties", typename=machine_type))
        return {
            "version": [numbers["major"], numbers["minor"], numbers["micro"]],
            "version_text": "{major}.{minor}.{micro}".format(**numbers)
            + (f" ({version['package']})" if version["package"] else ""),
            "machine": pseries[0],
            "machine_types": _names(machines),
            "properties": properties,
            "kvm": qmp.execute("query-kvm")["present"],
            # Every QEMU's QMP schema lists the backend; only an attempt shows if it is built in.
            "netdev_user": _execute_or_none(qmp, "netdev_add", type="user", id="probe") is not None,
            "cpu_models": _names(qmp.execute("query-cpu-definitions")),
            "qmp_commands": _names(qmp.execute("query-commands")),
            "migration_capabilities": [
                item["capability"] for item in qmp.execute("query-migrate-capabilities")
            ],
        }


def sanitizers(program: Path) -> tuple[str, ...]:
    """Return the libraries that must be loaded into the program before the shim.

    AddressSanitizer and similar runtimes abort a program that loads another library first.

    Raises:
        CapabilityError: the program is static or a script, so the shim cannot be preloaded.
    """
    hint = "set qemu= to a dynamically linked QEMU"
    try:
        with program.open("rb") as file:
            segments = list(ELFFile(file).iter_segments())
            if not any(isinstance(segment, InterpSegment) for segment in segments):
                raise CapabilityError(
                    f"{program} is static: the flush shim cannot be preloaded", hint=hint
                )
            dynamic = next(s for s in segments if isinstance(s, DynamicSegment))
            # DynamicTag sets the attribute at run time.
            needed = [str(vars(tag)["needed"]) for tag in dynamic.iter_tags("DT_NEEDED")]
            return tuple(name for name in needed if _SANITIZER.match(name))
    except (OSError, ELFError) as error:
        raise CapabilityError(
            f"{program} is not an ELF program: the flush shim must be preloaded into QEMU itself",
            hint=hint,
        ) from error


def _names(items: JSON) -> list[str]:
    return sorted(item["name"] for item in items)


@contextlib.contextmanager
def _monitor(argv_prefix: Sequence[str], path: Path) -> Iterator[Qmp]:
    """Start the binary without a machine and yield its monitor."""
    argv = [*argv_prefix, "-M", "none", "-nodefaults", "-display", "none", "-qmp", "stdio"]
    with contextlib.ExitStack() as stack:
        stderr = stack.enter_context(tempfile.TemporaryFile())
        ours, theirs = map(stack.enter_context, socket.socketpair())
        handle = theirs.fileno()
        try:
            qemu = Process(argv, stdin=handle, stdout=handle, stderr=stderr.fileno())
        except HostError as error:
            raise ConfigError(
                f"{path} is not a QEMU for this machine: {error}", hint=f"name the binary, {BINARY}"
            ) from error
        stack.callback(qemu.kill)
        theirs.close()
        try:
            qmp = Qmp(ours, timeout_s=_ANSWER_LIMIT_S)
            stack.callback(qmp.close)
            yield qmp
        except RefusedError as error:
            raise HostError(f"{path}: {error}") from error
        except GuestLostError as error:
            reason = error.__cause__
            if isinstance(reason, TimeoutError):
                message = f"{path} did not answer for {_ANSWER_LIMIT_S:g} s"
                raise HostError(message) from error
            if isinstance(reason, ConnectError) and not isinstance(reason.exc, (EOFError, OSError)):
                raise ConfigError(
                    f"{path} is not a QEMU", hint=f"name the binary, {BINARY}"
                ) from error
            stderr.seek(0)
            output = stderr.read(4000).decode(errors="replace").strip()
            raise _early_end(path, qemu.wait(_ANSWER_LIMIT_S), output) from error


def _early_end(path: Path, status: int | None, output: str) -> Error:
    """Build the error for a QEMU that ended without an answer."""
    how = describe_status(status) if status is not None else "closed its output"
    last = output.splitlines()[-1] if output else "it printed nothing"
    if match := re.search(r"error while loading shared libraries: ([^:]+)", output):
        return HostError(
            f"{path} does not start: the library {match[1]} is missing",
            hint="install that library, or set qemu=auto",
        )
    if (status or 0) > 0 and "qemu" not in output.lower():
        return ConfigError(
            f"{path} is not a QEMU: {how}; {last}", hint=f"name the binary, {BINARY}"
        )
    return HostError(f"{path} does not start: {how}; {last}")


def _execute_or_none(qmp: Qmp, command: str, **arguments: JSON) -> JSON | None:
    """Run one QMP command; return None if QEMU answers with an error."""
    try:
        return qmp.execute(command, **arguments)
    except RefusedError:
        return None
