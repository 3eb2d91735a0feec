# SPDX-License-Identifier: GPL-2.0-or-later
"""The interface under test as data: hcalls, return codes, DRC indices, device tree, sizes.

Sources: "Linux on Power Architecture Reference" (LoPAR), chapter "Storage Class Memory"; Linux
arch/powerpc/include/asm/hvcall.h, arch/powerpc/platforms/pseries/papr_scm.c,
include/linux/papr_scm.h; QEMU include/hw/ppc/spapr.h, hw/ppc/spapr_nvdimm.c,
include/hw/ppc/spapr_drc.h.
"""

from __future__ import annotations

from enum import IntEnum, StrEnum
from typing import Final


class Hcall(IntEnum):
    """The hypervisor calls of storage class memory (Linux hvcall.h)."""

    H_SCM_READ_METADATA = 0x3E4
    H_SCM_WRITE_METADATA = 0x3E8
    H_SCM_BIND_MEM = 0x3EC
    H_SCM_UNBIND_MEM = 0x3F0
    # QEMU registers neither of the two queries, nor the statistics: H_FUNCTION.
    H_SCM_QUERY_BLOCK_MEM_BINDING = 0x3F4
    H_SCM_QUERY_LOGICAL_MEM_BINDING = 0x3F8
    H_SCM_UNBIND_ALL = 0x3FC
    H_SCM_HEALTH = 0x400
    H_SCM_PERFORMANCE_STATS = 0x418
    # Linux commit 75b7c05ebf90 ("powerpc/papr_scm: Implement support for H_SCM_FLUSH hcall")
    # (in v5.13); QEMU commit b5513584a08d (in v7.0).
    H_SCM_FLUSH = 0x44C


class ReturnCode(IntEnum):
    """Return codes of hcalls, as signed numbers (Linux hvcall.h)."""

    H_SUCCESS = 0
    H_BUSY = 1
    H_LONG_BUSY_ORDER_1_MSEC = 9900
    H_LONG_BUSY_ORDER_10_MSEC = 9901
    H_LONG_BUSY_ORDER_100_MSEC = 9902
    H_LONG_BUSY_ORDER_1_SEC = 9903
    H_LONG_BUSY_ORDER_10_SEC = 9904
    H_LONG_BUSY_ORDER_100_SEC = 9905
    H_HARDWARE = -1
    H_FUNCTION = -2
    H_PRIVILEGE = -3
    H_PARAMETER = -4
    H_NOT_FOUND = -7
    H_NO_MEM = -9
    H_AUTHORITY = -10
    H_P2 = -55
    H_P3 = -56
    H_P4 = -57
    H_P5 = -58
    H_UNSUPPORTED = -67
    H_OVERLAP = -68


LONG_BUSY_MS: Final = {
    ReturnCode.H_LONG_BUSY_ORDER_1_MSEC: 1,
    ReturnCode.H_LONG_BUSY_ORDER_10_MSEC: 10,
    ReturnCode.H_LONG_BUSY_ORDER_100_MSEC: 100,
    ReturnCode.H_LONG_BUSY_ORDER_1_SEC: 1_000,
    ReturnCode.H_LONG_BUSY_ORDER_10_SEC: 10_000,
    ReturnCode.H_LONG_BUSY_ORDER_100_SEC: 100_000,
}
"""Time that a caller should wait before it polls again, ms (hvcall.h:get_longbusy_msecs)."""


def return_code_name(value: int) -> str:
    """The name of a return code, such as "H_P2"; an unlisted code stays a number.

    Args:
        value: r3 after the hcall, signed or as an unsigned 64-bit register value.
    """
    signed = value - (1 << 64) if value >= 1 << 63 else value
    try:
        return ReturnCode(signed).name
    except ValueError:
        return str(signed)


DRC_TYPE_PMEM: Final = 9
"""The type number of a persistent memory connector (QEMU spapr_drc.h:SpaprDRConnectorTypeShift)."""

HCALL_REGISTERS: Final = 9
"""Number of arguments of an hcall, and of outputs in addition to its return code: r4 to r12."""

MAX_SLOTS: Final = 32
"""Number of memory slots that a pseries machine can have (QEMU spapr.h:SPAPR_MAX_RAM_SLOTS)."""


def drc_index(slot: int) -> int:
    """The DRC index of the nvdimm in a memory slot: 0x90000000 + slot.

    Args:
        slot: 0 to 31, the device's `slot` property.

    Raises:
        ValueError: no pseries machine has such a slot.

    The type is in the top 4 bits, the connector's own number below (QEMU
    spapr_drc.c:spapr_drc_index, spapr_nvdimm.c:spapr_create_nvdimm_dr_connectors).
    """
    if not 0 <= slot < MAX_SLOTS:
        raise ValueError(f"slot {slot} is not one of 0 to {MAX_SLOTS - 1}")
    return DRC_TYPE_PMEM << 28 | slot


class UnbindScope(IntEnum):
    """The first argument of H_SCM_UNBIND_ALL (Linux hvcall.h)."""

    ALL = 1
    DRC = 2


SCM_BLOCK_SIZE: Final = 256 << 20
"""The size of an SCM block, bytes (QEMU spapr_nvdimm.h:SPAPR_MINIMUM_SCM_BLOCK_SIZE)."""

SCM_MIN_LABEL_SIZE: Final = 128 << 10
"""The smallest label area, bytes (QEMU nvdimm.h:MIN_NAMESPACE_LABEL_SIZE)."""

BIND_ANY_ADDRESS: Final = (1 << 64) - 1
"""The address argument of H_SCM_BIND_MEM that leaves the choice to the hypervisor (papr_scm.c)."""

PARENT_NODE: Final = "ibm,persistent-memory"
"""Device tree node below the root that holds all nvdimms; it exists even without any."""

NODE: Final = "ibm,pmemory"
"""Name, device_type and compatible of one nvdimm's node; its unit address is the DRC index."""


def node_name(slot: int) -> str:
    """The device tree name of the nvdimm in a memory slot: "ibm,pmemory@90000001"."""
    return f"{NODE}@{drc_index(slot):x}"


class Property(StrEnum):
    """The properties of an nvdimm's node (QEMU spapr_nvdimm.c:spapr_dt_nvdimm)."""

    REG = "reg"
    DRC_INDEX = "ibm,my-drc-index"
    COMPATIBLE = "compatible"
    DEVICE_TYPE = "device_type"
    ASSOCIATIVITY = "ibm,associativity"
    UNIT_GUID = "ibm,unit-guid"
    BLOCK_SIZE = "ibm,block-size"
    NUMBER_OF_BLOCKS = "ibm,number-of-blocks"
    METADATA_SIZE = "ibm,metadata-size"
    APPLICATION = "ibm,pmem-application"
    CACHE_FLUSH_REQUIRED = "ibm,cache-flush-required"
    """Empty; without it Linux treats the memory as volatile (papr_scm.c:papr_scm_probe)."""
    HCALL_FLUSH_REQUIRED = "ibm,hcall-flush-required"
    """Empty; with it the guest must flush by H_SCM_FLUSH, and MAP_SYNC is refused."""
    PERSISTENCE_FAILED_COUNT = "ibm,persistence-failed-count"
    """Never set by QEMU."""


class Health(IntEnum):
    """Bits of H_SCM_HEALTH's bitmap (Linux include/linux/papr_scm.h); QEMU only sets UNARMED."""

    UNARMED = 1 << 63
    SHUTDOWN_DIRTY = 1 << 62
    SHUTDOWN_CLEAN = 1 << 61
    EMPTY = 1 << 60
    CRITICAL = 1 << 59
    FATAL = 1 << 58
    UNHEALTHY = 1 << 57
    NON_CRITICAL = 1 << 56
    ENCRYPTED = 1 << 55
    SCRUBBED_AND_LOCKED = 1 << 54
