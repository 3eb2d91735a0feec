# SPDX-License-Identifier: GPL-2.0-or-later
"""PAPR's numbers as printed by guests and QEMU, in other bases and signs."""

from __future__ import annotations

import pytest

from paprscm.papr import LONG_BUSY_MS, Hcall, ReturnCode, drc_index, node_name, return_code_name


def test_opcodes_of_the_guest_s_statistics() -> None:
    """debugfs hcall_inst and the hcall_entry tracepoint print decimal numbers."""
    names = {
        996: "H_SCM_READ_METADATA",
        1000: "H_SCM_WRITE_METADATA",
        1004: "H_SCM_BIND_MEM",
        1008: "H_SCM_UNBIND_MEM",
        1020: "H_SCM_UNBIND_ALL",
        1024: "H_SCM_HEALTH",
        1100: "H_SCM_FLUSH",
    }
    assert {number: Hcall(number).name for number in names} == names


def test_return_codes_from_registers() -> None:
    assert return_code_name((1 << 64) - 55) == return_code_name(-55) == "H_P2"
    assert return_code_name(9901) == "H_LONG_BUSY_ORDER_10_MSEC"
    assert return_code_name(-4242) == "-4242"


def test_every_long_busy_code_has_its_hint() -> None:
    codes = [code for code in ReturnCode if "LONG_BUSY" in code.name]
    assert list(LONG_BUSY_MS) == codes == list(range(9900, 9906))
    assert list(LONG_BUSY_MS.values()) == [10**power for power in range(6)]


def test_drc_index_of_a_slot() -> None:
    assert [drc_index(slot) for slot in (0, 5, 31)] == [0x90000000, 0x90000005, 0x9000001F]
    assert node_name(31) == "ibm,pmemory@9000001f"
    for slot in (-1, 32):
        with pytest.raises(ValueError, match="0 to 31"):
            drc_index(slot)
