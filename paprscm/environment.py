# SPDX-License-Identifier: GPL-2.0-or-later
"""All that guests are made of, from the settings: QEMU, kernel, userland; built where missing."""

from __future__ import annotations

import dataclasses
import tempfile
from dataclasses import dataclass
from pathlib import Path

from paprscm import isa, kbuild, kernel, log, modules, qemu, userland
from paprscm.cache import Cache
from paprscm.errors import CapabilityError, ConfigError, Error, HostError
from paprscm.guest import Equipment, Guest
from paprscm.machine import Machine, Nvdimm, Payload
from paprscm.settings import Settings


@dataclass(frozen=True, kw_only=True)
class Environment:
    """What the guests of one run have in common.

    Attributes:
        settings: what the user chose.
        qemu: the QEMU under test.
        kernel: the kernel under test, as it was given or built.
        accel: "tcg" or "kvm".
        cpu: the -cpu model.
        fixed_sites: how many instructions were rewritten for TCG.
        equipment: the same, as a guest takes it.
    """

    settings: Settings
    qemu: qemu.Qemu
    kernel: kernel.Kernel
    accel: str
    cpu: str
    fixed_sites: int
    equipment: Equipment

    def furnish(self, machine: Machine) -> Machine:
        """The machine with CPU, memory, firmware and accelerator from the settings."""
        chosen = self.settings
        return dataclasses.replace(
            machine,
            smp=chosen.smp,
            memory_mib=chosen.memory_mib,
            cpu=self.cpu,
            firmware=chosen.firmware,
            accel=self.accel,
        )

    def require(self, nvdimm: Nvdimm) -> None:
        """Raise unless the QEMU has what the DIMM needs.

        Raises:
            CapabilityError: it has not; with the way to one that has.
        """
        hint = "qemu=debian:trixie fetches one that has it"
        if nvdimm.pmem and not self.qemu.has_pmem:
            raise CapabilityError(f"{self.qemu.path} is built without libpmem: no pmem=on", hint=hint)
        if nvdimm.pmem_override and not self.qemu.has_pmem_override:
            raise CapabilityError(f"{self.qemu.path} has no pmem-override", hint=hint)

    def describe(self) -> dict[str, str]:
        """The dimensions of a result, by name."""
        return {
            "qemu": self.qemu.version_text,
            "qemu_path": str(self.qemu.path),
            "kernel": self.kernel.release,
            "kernel_path": str(self.kernel.path),
            "page_size": str(self.kernel.page_size),
            "accel": self.accel,
            "cpu": self.cpu,
            "smp": str(self.settings.smp),
            "memory_mib": str(self.settings.memory_mib),
            "firmware": self.settings.firmware,
            "fixed_sites": str(self.fixed_sites),
        }
