# SPDX-License-Identifier: GPL-2.0-or-later
"""Probe which persistent-memory instructions a QEMU executes under TCG."""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from paprscm.build.tcg_fixup import DCBF, INSTRUCTIONS
from paprscm.debian.toolchain import PREFIX, require_program
from paprscm.errors import CapabilityError, HostError, KilledError
from paprscm.host.process import run
from paprscm.paths import GUEST_TOOLS

_SOURCE = GUEST_TOOLS / "isa_probe.S"
# Expected results that validate the probe: every POWER CPU has dcbf; opcode 0 is always illegal.
_CONTROLS = {"dcbf": (DCBF, True), "illegal": (0, False)}


def probe(qemu: Sequence[str], *, cpu: str = "POWER9", timeout_s: float = 10.0) -> dict[str, bool]:
    """Probe which of `INSTRUCTIONS` this QEMU executes under TCG; takes 0.1 s, on bare metal.

    Args:
        qemu: the command line that starts qemu-system-ppc64, without machine options.
        cpu: the -cpu model of the guests; TCG's decoder depends on it.
        timeout_s: time limit of the program, s.

    Returns:
        For each instruction's name, True if it is executed.

    Raises:
        CapabilityError: the QEMU does not run the program (for example, it has no x-vof option).
        HostError: the cross binutils are missing, or the control instructions have wrong results.
    """
    with tempfile.TemporaryDirectory(prefix="paprscm-isa-") as folder:
        program = _assemble(Path(folder))
        argv = [
            *qemu,
            *("-nodefaults", "-display", "none", "-monitor", "none", "-serial", "none"),
            *("-accel", "tcg", "-cpu", cpu, "-m", "256M", "-no-reboot"),
            "-machine",
            "pseries,x-vof=on,cap-cfpc=broken,cap-sbbc=broken,cap-ibs=broken,cap-ccf-assist=off",
            *("-chardev", "stdio,id=out,signal=off"),
            *("-device", "spapr-vty,chardev=out,reg=0x30000000"),
            *("-kernel", str(program)),
        ]
        try:
            output = run(argv, timeout_s=timeout_s).text
        except KilledError:
            raise
        except HostError as error:
            raise CapabilityError(
                f"{qemu[-1]} gave no answer to the instruction probe: {error.message}"
            ) from error
    line = re.search(r"isa-probe: ((?:\w+=[01] )+)end", output)
    if line is None:
        raise CapabilityError(
            f"{qemu[-1]} ended without an answer to the instruction probe; its output: "
            + (output.strip() or "nothing")
        )
    answers = {name: value == "1" for name, value in (x.split("=") for x in line[1].split())}
    for name, (_word, expected) in _CONTROLS.items():
        if answers.pop(name, None) is not expected:
            raise HostError(f"the instruction probe on {qemu[-1]} is unreliable: {line[0]}")
    return answers


def probe_digest() -> str:
    """Return a short digest of the probe's program and table; results are valid only for it."""
    table = repr((INSTRUCTIONS, _CONTROLS)).encode()
    return hashlib.sha256(_SOURCE.read_bytes() + table).hexdigest()[:12]


def _assemble(folder: Path) -> Path:
    """Assemble and link guest_tools/isa_probe.S with the table of instructions."""
    words = {name: word for name, (word, _expected) in _CONTROLS.items() if word}
    # RA=0, RB=r28 if the instruction has operands.
    words |= {i.name: i.word for i in INSTRUCTIONS}
    lines = [
        f"\tprobe {name}, {word | (28 << 11 if word & 0x7FF == DCBF & 0x7FF else 0):#010x}\n"
        for name, word in [*words.items(), ("illegal", 0)]
    ]
    (folder / "isa_probe_table.inc").write_text("".join(lines))
    objects, program = folder / "isa_probe.o", folder / "isa_probe"
    assembler, linker = require_program(f"{PREFIX}as"), require_program(f"{PREFIX}ld")
    run([assembler, "-mbig", "-a64", "-mpower8", f"-I{folder}", "-o", objects, _SOURCE])
    run([linker, "-EB", "-m", "elf64ppc", "-Ttext", "0", "-o", program, objects])
    return program
