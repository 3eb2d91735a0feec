# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMU refuses invalid NVDIMM command lines with a reason; no guest runs.

The checks are mostly in hw/ppc/spapr_nvdimm.c (spapr_nvdimm_validate), hw/mem/nvdimm.c and
hw/mem/pc-dimm.c; the command lines are in paprscm/device/refusal_rows.py, QEMU's reasons in
refusals.py. The contract is an orderly refusal (exit status 1) with a message; a refusal for
another reason than expected ends a test as WARN.
"""

import mmap
from collections.abc import Mapping, Sequence
from pathlib import Path

from paprscm.device.device_tree import parse_tree
from paprscm.device.launch import Attempt, attempt
from paprscm.device.refusal_rows import GROUPS
from paprscm.device.refusals import (
    LIMITS,
    backend,
    board,
    device,
    dimm,
    filled,
    make_files,
    names_one,
    on,
    reason_patterns,
)
from paprscm.errors import CapabilityError, ContractError
from paprscm.papr import Property, drc_index
from paprscm.testcase import QemuTest
from paprscm.vm.dimms import PMEM_ON
from paprscm.vm.machine import GIB, MIB

# include/uapi/asm-generic/mman-common.h
MAP_SHARED_VALIDATE, MAP_SYNC = 0x03, 0x080000


class Validation(QemuTest):
    """
    Command lines that QEMU must refuse, or must accept.

    :avocado: tags=device
    """

    def setUp(self) -> None:
        super().setUp()
        # QEMU prints the resolved path.
        self.places = make_files(Path(self.workdir).resolve())

    def attempt(self, words: Sequence[str], *, machine: str = "") -> Attempt:
        """Try a command line with placeholders."""
        return attempt(self.qemu, filled(words, self.places), machine=machine)

    def judge(self, group: str) -> None:
        """Check that QEMU refuses each row of the group; another reason is a remark."""
        rows = GROUPS[group]
        others: list[str] = []
        for row in rows:
            outcome = self.attempt(row.words, machine=row.machine)
            if not outcome.refused:
                self.check(row.name, str(outcome), f"a refusal: {reason_patterns(row.reasons)}")
            elif not names_one(outcome.text, row.reasons):
                others.append(f"{row.name}: {outcome}\n  expected {reason_patterns(row.reasons)}")
        self.metric("rows", len(rows), "rows")
        if others:
            self.remark(f"{len(others)} of {len(rows)} refusals:\n" + "\n".join(others))

    def pin(self, issue: str, cases: Mapping[str, Sequence[str]]) -> None:
        """Each command line should be refused, but a known issue lets some of them pass."""
        outcomes = {name: self.attempt(words) for name, words in cases.items()}
        for name, outcome in outcomes.items():
            self.expect_end(name, outcome)
        accepted = [name for name, outcome in outcomes.items() if outcome.accepted]
        text = f"QEMU accepts {', '.join(accepted)}" if accepted else "QEMU refuses all of them"
        self.conclude(issue, shows=bool(accepted), found=text)

    def expect_end(self, what: str, outcome: Attempt, *, accepted: bool = True) -> None:
        """End the test unless QEMU refuses the command line, or (if `accepted`) accepts it."""
        if not outcome.refused and not (accepted and outcome.accepted):
            raise ContractError(f"{what}: {outcome}")

    def conclude(self, issue: str, *, shows: bool, found: str) -> None:
        """Report whether a known issue shows; a QEMU that refuses a good DIMM is an error."""
        if not shows:
            control = self.attempt(LIMITS["label of 128K"])
            if not control.accepted:
                raise ContractError(f"a good DIMM: {control}")
        self.known_issue(issue, shows=shows, found=found)

    def test_sizes_and_labels(self) -> None:
        """Sizes and label sizes that PAPR or the backend does not allow are refused."""
        self.judge("sizes and labels")

    def test_uuid(self) -> None:
        """A missing or malformed uuid is refused."""
        self.judge("uuid")

    def test_backend(self) -> None:
        """A backend that a DIMM cannot use is refused."""
        self.judge("backend")

    def test_slots(self) -> None:
        """A slot that does not exist or is in use is refused."""
        self.judge("slots")

    def test_nodes_and_addresses(self) -> None:
        """A NUMA node or an address that does not exist or is in use is refused."""
        self.judge("nodes and addresses")

    def test_machine(self) -> None:
        """A machine without NVDIMM support refuses them."""
        self.judge("machine")

    def test_limits(self) -> None:
        """A command line that is just within the limits is accepted."""
        cases = dict(LIMITS)
        if self.qemu.has("memory-backend-file", "offset"):
            cases["offset of one page"] = board(*on(path="{large}", more="share=on,offset=4096"))
        for name, words in cases.items():
            outcome = self.attempt(words)
            self.check(name, "accepted" if outcome.accepted else str(outcome), "accepted")
            self.usual(f"message at {name}", outcome.text, "")

    def test_pmem_on_an_ordinary_file(self) -> None:
        """With pmem=on on a file that is not persistent memory, QEMU warns, or refuses."""
        self.require_qemu(PMEM_ON)
        file = self.places["dimm"]
        with Path(file).open("r+b") as opened:
            try:
                mmap.mmap(opened.fileno(), mmap.PAGESIZE, flags=MAP_SHARED_VALIDATE | MAP_SYNC)
            except OSError:
                pass
            else:
                raise CapabilityError(f"{file} is persistent memory")
        outcome = self.attempt(board(*on(more="share=on,pmem=on")))
        warning = (
            f"Warning: requesting persistence across crashes for backend file {file} failed. "
            "Proceeding without persistence, data might become corrupted in case of host crash.\n"
            "warning: Using non DAX backing file with 'pmem=on' option is deprecated"
        )
        if not (outcome.accepted or outcome.refused) or not outcome.text:
            raise ContractError(f"neither a warning nor a refusal: {outcome}")
        self.usual("accepted, message", (outcome.accepted, outcome.text), (True, warning))

    def test_private_mapping(self) -> None:
        """A private mapping, which keeps the guest's writes from the file, is refused."""
        cases = {"share=off, the default": board(*on(more=""))}
        if self.qemu.has_pmem:
            cases["share=off,pmem=on"] = board(*on(more="share=off,pmem=on"))
        if self.qemu.has("memory-backend-file", "rom"):
            cases["share=off,readonly=on,rom=off"] = board(
                *on(more="share=off,readonly=on,rom=off")
            )
        self.pin("qemu-nvdimm-share-off", cases)

    def test_volatile_file(self) -> None:
        """A backend whose file cannot be opened again is refused."""
        self.pin(
            "qemu-nvdimm-on-volatile-file",
            {
                "memory-backend-ram,share=on": board(*on(kind="ram", path=None)),
                "memory-backend-memfd": board(*on(kind="memfd", path=None)),
                "a folder as mem-path": board(*on(path="{folder}")),
                "/dev/zero as mem-path": board(*on(path="/dev/zero")),
            },
        )

    def test_plain_nvdimm_in_memory(self) -> None:
        """A plain nvdimm on a backend without a file is refused."""
        words = board(*backend(kind="ram", path=None, more=""), *device(driver="nvdimm"))
        self.pin("qemu-plain-nvdimm-on-ram", {"nvdimm on memory-backend-ram": words})

    def test_file_used_twice(self) -> None:
        """Two DIMMs on the same file are refused."""
        words = board(*backend(), *device(), *backend(1), *device(1))
        self.pin("qemu-nvdimm-file-used-twice", {"two DIMMs on one file": words})

    def test_uuid_used_twice(self) -> None:
        """Two DIMMs with the same uuid are refused."""
        uuid = "7f9b6a0e-52f5-4d0a-8d5c-0c3f1f0b9a11"
        words = board(
            *(*backend(), *device(uuid=uuid), *backend(1, path="{second}"), *device(1, uuid=uuid))
        )
        self.pin("qemu-nvdimm-uuid-used-twice", {"two DIMMs with one uuid": words})

    def test_address_not_in_whole_blocks(self) -> None:
        """A DIMM at an address that is not a multiple of PAPR's SCM block is refused."""
        cases = {
            name: board(*dimm(addr=addr))
            for name, addr in (("addr=0x40001000", "0x40001000"), ("addr=0x48000000", "0x48000000"))
        }
        self.pin("qemu-nvdimm-address-not-aligned", cases)

    def test_label_beyond_32_bits(self) -> None:
        """A label area that does not fit into ibm,metadata-size is refused."""
        size = 256 * MIB + 4 * GIB
        outcome = self.attempt(
            board(*backend(path="{label4g}", size=size), *device(label_size=str(4 * GIB)))
        )
        if outcome.tree is None:
            reported = None
            self.expect_end("a label area of 4 GiB", outcome, accepted=False)
        else:
            reported = parse_tree(outcome.tree).nvdimms[drc_index(0)].cell(Property.METADATA_SIZE)
        self.conclude(
            "qemu-nvdimm-label-size-truncated",
            shows=reported is not None,
            found=f"ibm,metadata-size of a label area of 4 GiB is {reported} bytes",
        )

    def test_read_only_and_preallocated(self) -> None:
        """prealloc=on with a read-only file does not kill QEMU by a signal."""
        outcome = self.attempt(
            board(*backend(more="share=on,readonly=on,prealloc=on"), *device(unarmed="on"))
        )
        self.conclude("qemu-prealloc-read-only-crash", shows=outcome.status < 0, found=str(outcome))

    def test_read_only_and_absent(self) -> None:
        """With readonly=on, QEMU does not create a missing file."""
        outcome = self.attempt(
            board(*backend(path="{absent}", more="share=on,readonly=on"), *device(unarmed="on"))
        )
        created = Path(self.places["absent"]).exists()
        if not created:
            self.expect_end("an absent file", outcome, accepted=False)
        self.conclude("qemu-readonly-makes-file", shows=created, found=str(outcome))

    def test_numbers_in_messages(self) -> None:
        """A refusal prints the wrong value of the command line, not another number."""
        cases = {
            "slot=0 without slots": (
                board(*dimm(slot="0"), memory="256M,maxmem=8G"),
                "18446744073709551615",
            ),
            "maxmem=8100M": (
                board(*dimm(), memory="256M,slots=4,maxmem=8100M"),
                "0x10000000",
            ),
            "-m 64M": (board(memory="64M"), "80ldMiB"),
            "size=2^64-1": (board(*backend(size=(1 << 64) - 1), *device()), "size 0x0"),
        }
        wrong = []
        for name, (words, number) in cases.items():
            outcome = self.attempt(words)
            self.expect_end(name, outcome, accepted=False)
            if number in outcome.text:
                wrong.append(f"{name} is refused because of {number}")
        self.conclude("qemu-refusals-with-wrong-numbers", shows=bool(wrong), found="; ".join(wrong))

    def test_dumpdtb_option(self) -> None:
        """The machine option dumpdtb= writes the device tree, as the monitor's command does."""
        file = Path(self.workdir) / "tree"
        words = board(*dimm())
        by_monitor, by_option = self.attempt(words), self.attempt(words, machine=f"dumpdtb={file}")
        if not by_monitor.accepted:
            raise ContractError(f"with the monitor's dumpdtb: {by_monitor}")
        written = by_option.status == 0 and file.exists()
        if written and drc_index(0) not in parse_tree(file.read_bytes()).nvdimms:
            raise ContractError(f"the tree that dumpdtb= wrote has no DIMM: {by_option}")
        self.conclude("qemu-pseries-dumpdtb-option", shows=not written, found=str(by_option))
