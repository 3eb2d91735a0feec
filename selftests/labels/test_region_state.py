# SPDX-License-Identifier: GPL-2.0-or-later
"""Parser of a region's state."""

from __future__ import annotations

import json

import pytest

from paprscm.errors import ContractError, HostError
from paprscm.labels.metadata import StoredNamespace
from paprscm.labels.region_state import DeviceState, NamespaceState, parse_state

# Linux 6.12.117 and ndctl 76.1, a region of 3 GiB; the devdax namespace was added by hand.
TEXTS = """\
attr . size 3221225472
attr . align 0x1000000
attr . available_size 536870912
attr . max_available_extent 520093696
attr . namespace_seed namespace0.2
attr . resource 0x40000000
attr ../nmem0 available_slots 506
attr pfn0.0 supported_alignments 65536 2097152 1073741824
attr namespace0.0 size 1073741824
attr namespace0.0 resource 0x40000000
attr namespace0.0 uuid 9de47bb2-e4eb-4740-a7b7-90157cc4f170
attr namespace0.0 holder_class\x20
attr namespace0.1 size 1073741824
attr namespace0.1 resource 0x81000000
attr namespace0.1 uuid 3ace722d-13b1-4bee-a7fb-3a0fb640543a
attr namespace0.1 holder_class btt
attr namespace0.2 size 0
attr namespace0.2 uuid\x20
attr namespace0.2 holder_class\x20
attr namespace0.3 size 536870912
attr namespace0.3 resource 0xc1000000
attr namespace0.3 uuid d5a1a7d1-6ef8-4754-b2e2-88292b465349
attr namespace0.3 holder_class dax
attr pfn0.0 namespace\x20
attr pfn0.0 uuid\x20
attr pfn0.0 mode none
attr pfn0.0 align 2097152
attr dax0.0 namespace namespace0.3
attr dax0.0 size 534773760
attr dax0.0 resource 0xc1200000
attr dax0.0 uuid 49d3dca3-4a32-47e3-aba5-10568ee47dae
attr dax0.0 mode pmem
attr dax0.0 align 2097152
attr btt0.1 namespace namespace0.1
attr btt0.1 size 1071616000
attr btt0.1 uuid ce459599-9f3f-457d-8c19-935e238a5af9
device btt0.1/block/pmem0.1s 2093000
device namespace0.0/block/pmem0 2097152
device dax0.0/dax0.0 534773760
"""
LISTED = {
    "regions": [
        {
            "dev": "region0",
            "size": 3221225472,
            "namespaces": [{"dev": "namespace0.0", "mode": "raw"}],
        }
    ]
}


def text(texts: str = TEXTS, listed: object = LISTED) -> str:
    return f"{texts}ndctl\n{json.dumps(listed)}\n"


def test_a_recorded_state() -> None:
    state = parse_state(text())
    assert (state.start, state.size_bytes, state.align) == (1 << 30, 3 << 30, 16 << 20)
    assert (state.available_bytes, state.largest_bytes) == (512 << 20, 496 << 20)
    assert state.alignments == {65536, 2 << 20, 1 << 30}
    assert (state.slots, state.has_seed) == (506, True)
    assert state.listed == {"dev": "region0", "size": 3221225472}
    raw, sector, devdax = sorted(state.namespaces.values(), key=lambda one: one.name)
    assert raw == NamespaceState(
        name="namespace0.0",
        stored=StoredNamespace("9de47bb2-e4eb-4740-a7b7-90157cc4f170", 0, 1 << 30),
        mode="raw",
        device=DeviceState(
            mode="raw",
            uuid="9de47bb2-e4eb-4740-a7b7-90157cc4f170",
            size_bytes=1 << 30,
            offset=0,
        ),
        listed={"dev": "namespace0.0", "mode": "raw"},
    )
    assert sector.mode == "sector"
    assert sector.device == DeviceState(
        mode="sector", uuid="ce459599-9f3f-457d-8c19-935e238a5af9", size_bytes=2093000 * 512
    )
    assert devdax.device == DeviceState(
        mode="devdax",
        uuid="49d3dca3-4a32-47e3-aba5-10568ee47dae",
        size_bytes=510 << 20,
        map="dev",
        align=2 << 20,
        offset=0x81200000,
    )
    assert state.stored == {raw.stored, sector.stored, devdax.stored}


def test_a_namespace_without_a_device_is_disabled() -> None:
    state = parse_state(text(TEXTS.replace("device dax0.0/dax0.0 534773760\n", "")))
    (devdax,) = (one for one in state.namespaces.values() if one.name == "namespace0.3")
    assert (devdax.device, devdax.mode) == (None, "devdax")


def test_a_seed_in_use_is_none() -> None:
    assert not parse_state(text(TEXTS.replace("seed namespace0.2", "seed namespace0.1"))).has_seed


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("attr . size 3221225472\n", "", "no attribute size"),
        ("size 3221225472", "size 3G", "not a number"),
        ("attr ../nmem0 available_slots 506\n", "", "available_slots"),
        ("holder_class btt", "holder_class blk", "holder_class"),
        ("mode pmem", "mode disk", "page structures"),
        ("d5a1a7d1-6ef8-4754-b2e2-88292b465349", "3ace722d-13b1-4bee-a7fb-3a0fb640543a", "two"),
        ("device namespace0.0/block", "device namespace0.1/block", "has devices"),
        ("device namespace0.0/block/pmem0 ", "device btt0.1/block/pmem0 ", "several devices"),
    ],
)
def test_a_contradictory_state_breaks_the_contract(old: str, new: str, reason: str) -> None:
    assert TEXTS.count(old) == 1
    with pytest.raises(ContractError, match=reason):
        parse_state(text(TEXTS.replace(old, new)))


@pytest.mark.parametrize(
    "output", [text("trouble\n"), text(listed=[]), text(listed=[{}, {}]), TEXTS + "ndctl\n", ""]
)
def test_a_malformed_state_is_our_fault(output: str) -> None:
    with pytest.raises(HostError):
        parse_state(output)
