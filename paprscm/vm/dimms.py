# SPDX-License-Identifier: GPL-2.0-or-later
"""DIMM kinds, which differ in how data becomes durable, and the DIMM sizes of tests.

Machine(nvdimms=(PMEM_ON, PMEM_OFF.at(1, SMALL)))
"""

from __future__ import annotations

from typing import Final

from paprscm.papr import SCM_BLOCK_SIZE
from paprscm.vm.machine import MIB, Nvdimm

SMALL: Final = SCM_BLOCK_SIZE
"""The smallest DIMM, 256 MiB; enough for ext4."""
FOR_XFS: Final = 512 * MIB
"""The smallest DIMM for XFS, and the default: mkfs.xfs needs 300 MB or more."""

PMEM_ON: Final = Nvdimm(pmem=True)
"""Persistent memory: the guest's CPU flushes its caches, and MAP_SYNC is granted."""
PMEM_OFF: Final = Nvdimm()
"""A regular file: the guest must call H_SCM_FLUSH, and MAP_SYNC is refused."""
OVERRIDE: Final = Nvdimm(pmem=True, pmem_override=True)
"""Persistent memory that requests H_SCM_FLUSH anyway (pmem-override=on)."""
PLAIN: Final = Nvdimm(device="nvdimm")
"""Device "nvdimm", older than spapr-nvdimm: a regular file that never requests H_SCM_FLUSH."""
