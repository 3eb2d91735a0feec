# SPDX-License-Identifier: GPL-2.0-or-later
"""Ask a QEMU binary what it is and what it can do, in one short QMP conversation."""

from __future__ import annotations

import json
import os
import re
import select
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

from elftools.common.exceptions import ELFError
from elftools.elf.dynamic import DynamicSegment
from elftools.elf.elffile import ELFFile
from elftools.elf.segments import InterpSegment

from paprscm.errors import CapabilityError, ConfigError, Error, HostError
from paprscm.host import process

JSON: TypeAlias = Any
"""Whatever json.dumps() takes and json.loads() gives back."""

BINARY = "qemu-system-ppc64"
FORMAT = "2"
"""Changes when `ask` returns something else."""

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
ASKED_TYPES = (
    "spapr-nvdimm",
    "nvdimm",
    "memory-backend-file",
    "memory-backend-memfd",
    "memory-backend-ram",
    "main-loop",
    *GUEST_TYPES,
)
"""Types whose properties are asked for. The list of all types (qom-list-types) is not: for it QEMU
loads every module in its compiled-in folder, and a QEMU run from another place aborts at those of
the host's (assertion in util/module.c:module_load_dso, seen with 10.0)."""

# Runtimes of gcc and clang that must be the first library of their program.
_SANITIZER = re.compile(r"lib(clang_rt\.)?(asan|hwasan|tsan)\b")


def ask(argv_prefix: Sequence[str], path: Path) -> dict[str, JSON]:
    """The fields of qemu.Qemu that the binary itself knows; it is started without a machine.

    Args:
        argv_prefix: how it is started.
        path: the binary, for messages.

    Raises:
        ConfigError: it is no QEMU, or one for another target.
        HostError: it does not start.
        CapabilityError: it has no pseries machine.
    """
    with tempfile.TemporaryFile() as stderr, _Conversation(argv_prefix, path, stderr) as qmp:
        version = qmp.version
        numbers = version["qemu"]
        target = qmp.ask("query-target")["arch"]
        if target != "ppc64":
            raise ConfigError(f"{path} is a QEMU for {target}, not for ppc64", hint=f"use {BINARY}")
        machines = qmp.ask("query-machines")
        pseries = [m["name"] for m in machines if m.get("alias") == "pseries"]
        if not pseries:
            raise CapabilityError(
                f"{path} has no pseries machine", hint="build it with CONFIG_PSERIES"
            )
        properties = {}
        for name in ASKED_TYPES:
            # None: it knows no such type.
            found = qmp.ask_or_none("qom-list-properties", typename=name)
            if found is not None:
                properties[name] = _names(found)
        machine_type = f"{pseries[0]}-machine"
        properties["machine"] = _names(qmp.ask("qom-list-properties", typename=machine_type))
        return {
            "version": [numbers["major"], numbers["minor"], numbers["micro"]],
            "version_text": "{major}.{minor}.{micro}".format(**numbers)
            + (f" ({version['package']})" if version["package"] else ""),
            "machine": pseries[0],
            "properties": properties,
            "kvm": qmp.ask("query-kvm")["present"],
            # The schema names the backend in every QEMU: only an attempt shows that it is built in.
            "netdev_user": qmp.ask_or_none("netdev_add", type="user", id="asked") is not None,
            "cpu_models": _names(qmp.ask("query-cpu-definitions")),
            "qmp_commands": _names(qmp.ask("query-commands")),
            "migration_capabilities": [
                item["capability"] for item in qmp.ask("query-migrate-capabilities")
            ],
        }


def sanitizers(program: Path) -> tuple[str, ...]:
    """Libraries that must be loaded into the program before the shim.

    AddressSanitizer and its kin end a program in which another library comes before theirs.

    Raises:
        CapabilityError: the shim cannot be loaded into it: it is static, or a script.
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


class _Conversation:
    """QMP over the standard streams of a QEMU without a machine; strictly question and answer."""

    def __init__(self, argv_prefix: Sequence[str], path: Path, stderr: BinaryIO) -> None:
        self._path = path
        self._stderr = stderr
        self._lines = b""
        self._deadline = time.monotonic() + _ANSWER_LIMIT_S
        theirs, self._commands = os.pipe()
        argv = [*argv_prefix, "-M", "none", "-nodefaults", "-display", "none", "-qmp", "stdio"]
        try:
            self._process = process.Process(
                argv, stdin=theirs, stdout=subprocess.PIPE, stderr=stderr.fileno()
            )
        except HostError as error:
            os.close(self._commands)
            raise ConfigError(
                f"{path} is not a QEMU for this machine: {error}", hint=f"name the binary, {BINARY}"
            ) from error
        finally:
            os.close(theirs)

    def __enter__(self) -> _Conversation:
        try:
            greeting = self._read().get("QMP")
            if not isinstance(greeting, dict) or "version" not in greeting:
                raise self._no_qemu()
            self.version: JSON = greeting["version"]
            self.ask("qmp_capabilities")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._commands)
        self._process.kill()

    def ask(self, command: str, **arguments: JSON) -> JSON:
        """The answer to one QMP command, which must succeed."""
        reply = self._exchange(command, arguments)
        if "error" in reply:
            why = reply["error"].get("desc", "no reason given")
            raise HostError(f"{self._path} refuses the QMP command {command}: {why}")
        return reply["return"]

    def ask_or_none(self, command: str, **arguments: JSON) -> JSON | None:
        """The answer to one QMP command, or None if it is an error."""
        return self._exchange(command, arguments).get("return")

    def _exchange(self, command: str, arguments: JSON) -> JSON:
        line = json.dumps({"execute": command, "arguments": arguments}) + "\n"
        try:
            os.write(self._commands, line.encode())
        except BrokenPipeError:
            raise self._ended() from None
        while True:
            message = self._read()
            if "return" in message or "error" in message:
                return message

    def _read(self) -> JSON:
        while b"\n" not in self._lines:
            poll = select.poll()
            poll.register(self._process.stdout, select.POLLIN)
            if not poll.poll(max(0.0, self._deadline - time.monotonic()) * 1000):
                raise HostError(f"{self._path} did not answer for {_ANSWER_LIMIT_S:g} s")
            chunk = os.read(self._process.stdout, 1 << 20)
            if not chunk:
                raise self._ended()
            self._lines += chunk
        line, _, self._lines = self._lines.partition(b"\n")
        try:
            message = json.loads(line)
        except ValueError:
            message = None
        if not isinstance(message, dict):
            raise self._no_qemu()
        return message

    def _no_qemu(self) -> ConfigError:
        return ConfigError(f"{self._path} is not a QEMU", hint=f"name the binary, {BINARY}")

    def _ended(self) -> Error:
        """What to say about a QEMU that ended instead of answering."""
        status = self._process.wait(_ANSWER_LIMIT_S)
        how = process.describe_status(status) if status is not None else "closed its output"
        self._stderr.seek(0)
        text = self._stderr.read(4000).decode(errors="replace").strip()
        last = text.splitlines()[-1] if text else "it printed nothing"
        if match := re.search(r"error while loading shared libraries: ([^:]+)", text):
            return HostError(
                f"{self._path} does not start: it misses the library {match[1]}",
                hint="install that library, or set qemu=auto",
            )
        if (status or 0) > 0 and "qemu" not in text.lower():
            return ConfigError(
                f"{self._path} is not a QEMU: {how}; {last}", hint=f"name the binary, {BINARY}"
            )
        return HostError(f"{self._path} does not start: {how}; {last}")
