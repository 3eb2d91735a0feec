# SPDX-License-Identifier: GPL-2.0-or-later
"""The device tree of a stopped machine agrees with the command line of its DIMMs.

No guest runs: QEMU is asked for the tree through its monitor, 0.1 s a machine. QEMU's side is
hw/ppc/spapr_nvdimm.c (spapr_dt_persistent_memory, spapr_dt_nvdimm).
"""

import functools
import itertools
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from mmap import PAGESIZE
from pathlib import Path

import hypothesis
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir

from paprscm.device.command_line import RawBackend, RawDimm, RawMachine
from paprscm.device.comparison import (
    judge_attempt,
    monitor_commands,
    numa_differences,
    unusual_messages,
)
from paprscm.device.device_tree import parse_tree
from paprscm.device.expected_tree import distance
from paprscm.device.launch import Attempt, attempt
from paprscm.device.prediction import predict
from paprscm.device.refusals import RefusalReason
from paprscm.device.strategies import FLAWS, any_machines, flawed_machines, valid_machines
from paprscm.errors import ContractError
from paprscm.papr import SCM_BLOCK_SIZE, SCM_MIN_LABEL_SIZE, drc_index
from paprscm.testcase import QemuTest
from paprscm.vm.machine import GIB, MIB

# Batches of machines for each four reasons (the first ones are always the simplest machines);
# number of concurrent QEMUs.
EXAMPLES = 8
AT_ONCE = 2
# Time limit for finding a simpler machine with the same fault.
SIMPLER_S = 60.0

# Reasons for which QEMU refuses random machines, by the wrong part; all others: the memory.
BACKEND = (
    RefusalReason.BACKEND_SIZE,
    RefusalReason.FILE_TOO_SMALL,
    RefusalReason.NO_MEMDEV,
    RefusalReason.MEMDEV_BUSY,
    RefusalReason.ARMED_READONLY,
    RefusalReason.NO_FILE,
    RefusalReason.LABEL_TOO_BIG,
    RefusalReason.NOT_IN_BLOCKS,
)
PROPERTY = (
    RefusalReason.LABEL_TOO_SMALL,
    RefusalReason.NO_LABEL,
    RefusalReason.UUID_MALFORMED,
    RefusalReason.NO_UUID,
    RefusalReason.OVERRIDE_UNKNOWN,
    RefusalReason.NVDIMM_OFF,
    RefusalReason.NODE_OUT_OF_RANGE,
)
PLACE = (
    RefusalReason.TOO_MANY_SLOTS,
    RefusalReason.SLOT_OUT_OF_RANGE,
    RefusalReason.SLOT_BUSY,
    RefusalReason.NO_SLOTS,
    RefusalReason.NO_FREE_SLOT,
    RefusalReason.NO_SPACE,
    RefusalReason.ADDR_UNALIGNED,
    RefusalReason.ADDR_OUTSIDE,
    RefusalReason.ADDR_CONFLICT,
    RefusalReason.FRAGMENTED,
)

# Backend of the smallest DIMM.
PLAIN = RawBackend(SCM_BLOCK_SIZE + SCM_MIN_LABEL_SIZE)

UUID = "6f1c7a52-3a0e-4b43-9a1f-5a7e61f0c9%02x"


def dimms_of(
    pairs: Iterable[tuple[RawBackend, RawDimm]],
    *,
    slots: int = 32,
    nodes: tuple[int, ...] = (),
    distances: tuple[tuple[int, int, int], ...] = (),
) -> RawMachine:
    """A machine with these DIMMs, each with its own backend and uuid, and maxmem for all."""
    backends, dimms = [], []
    for number, (backend, dimm) in enumerate(pairs):
        backends.append(backend)
        changes = {"memdev": number, "uuid": dimm.uuid or UUID % number}
        dimms.append(RawDimm(**{**vars(dimm), **changes}))
    memory = sum(nodes) or 256 * MIB
    return RawMachine(
        memory_bytes=memory,
        slots=slots,
        maxmem_bytes=memory + GIB + sum(backend.size_bytes for backend in backends) // GIB * GIB,
        nodes=nodes,
        distances=distances,
        backends=tuple(backends),
        dimms=tuple(dimms),
    )


class TreeTest(QemuTest):
    """Base of the device-tree tests: try machines, and judge their trees."""

    timeout = 500

    def setUp(self) -> None:
        """Create empty results and the thread pool."""
        super().setUp()
        self.verdicts: dict[RawMachine, str | None] = {}
        """Faults of each machine that was tried, or None."""
        self.outcomes: Counter[str] = Counter()
        self.unusual: set[str] = set()
        """Messages of QEMU whose text differs from the known one."""
        self.end_s: float | None = None
        """Time after a first fault at which no more machines are tried."""
        # Avocado creates workdir at the first access, which is not thread-safe.
        self.place = Path(self.workdir)
        self.pool = self.leave.enter_context(ThreadPoolExecutor(AT_ONCE))

    @functools.cached_property
    def has_private(self) -> bool:
        """QEMU accepts a DIMM whose backend is not shared.

        One that refuses it, and takes a shared one, has a fix of
        known_issues/qemu-nvdimm-share-off.
        """
        size = SCM_BLOCK_SIZE + SCM_MIN_LABEL_SIZE
        private, shared = (
            self.attempt(dimms_of([(RawBackend(size_bytes=size, share=share), RawDimm())]))
            for share in (False, True)
        )
        return not (private.refused and shared.accepted)

    def attempt(self, machine: RawMachine) -> Attempt:
        """Start the machine in QEMU, and query its DIMMs."""
        with tempfile.TemporaryDirectory(dir=self.place) as folder:
            for name, size in machine.files().items():
                with (Path(folder) / name).open("wb") as file:
                    file.truncate(size)
            return attempt(
                self.qemu,
                machine.words(),
                machine=machine.option(),
                commands=monitor_commands(machine),
                cwd=Path(folder),
            )

    def tried(self, machine: RawMachine) -> str | None:
        """Faults of the machine's tree, or None; each machine is tried only once."""
        if machine not in self.verdicts:
            if self.end_s is not None and time.monotonic() > self.end_s:
                return None
            prediction = predict(machine, has_override=self.qemu.has_pmem_override)
            outcome = self.attempt(machine)
            named = [reason.name for reason in RefusalReason if reason.is_in(outcome.text)]
            self.outcomes["accepted" if outcome.accepted else " and ".join(named)] += 1
            try:
                self.verdicts[machine] = judge_attempt(machine, prediction, outcome)
            except ContractError as error:
                self.verdicts[machine] = str(error)
            if self.verdicts[machine] is None and (
                message := unusual_messages(prediction, outcome)
            ):
                self.unusual.add(message)
        return self.verdicts[machine]

    def remark_unusual(self) -> None:
        """End as WARN if messages have another text; print the first few."""
        if self.unusual:
            first = "\n".join(sorted(self.unusual)[:5])
            self.remark(f"{len(self.unusual)} messages of QEMU, the first:\n{first}")

    def try_all(self, machines: Sequence[RawMachine]) -> None:
        """Try machines, several concurrently.

        Raises:
            ContractError: a machine's tree is wrong; the message has a command that reproduces it.
        """
        for machine, wrong in zip(machines, self.pool.map(self.tried, machines), strict=True):
            if wrong is not None:
                self.end_s = self.end_s or time.monotonic() + SIMPLER_S
                command = machine.script(self.qemu.argv_prefix)
                raise ContractError(f"{wrong}\nmachine:\n    {command}")


class EveryKind(TreeTest):
    """
    Every kind of DIMM, and every number of DIMMs and slots.

    :avocado: tags=device,device_tree
    """

    def kinds(self) -> list[tuple[RawBackend, RawDimm]]:
        """All combinations that this QEMU supports, with different sizes."""
        on_off = (False, True)
        pmem = on_off if self.qemu.has_pmem else (False,)
        combinations: list[tuple[RawBackend, RawDimm]] = []
        for driver, is_pmem, override, share, unarmed, label, node in itertools.product(
            ("spapr-nvdimm", "nvdimm"),
            pmem,
            on_off if self.qemu.has_pmem_override else (False,),
            on_off,
            on_off,
            (SCM_MIN_LABEL_SIZE, SCM_MIN_LABEL_SIZE + 4097, 2 * MIB),
            (0, 1),
        ):
            if driver == "nvdimm" and override:
                continue
            if not share and not self.has_private:
                continue
            blocks = 1 + len(combinations) % 3
            # A file has whole pages; QEMU does not use the rest of the last one.
            size = blocks * SCM_BLOCK_SIZE + -(-label // PAGESIZE) * PAGESIZE
            combinations.append(
                (
                    RawBackend(size_bytes=size, share=share, pmem=is_pmem),
                    RawDimm(
                        driver=driver,
                        label_bytes=label,
                        node=node,
                        pmem_override=override,
                        unarmed=unarmed,
                    ),
                )
            )
        return combinations

    def machines_of(self, count: int) -> list[RawMachine]:
        """Machines with `count` DIMMs each that together cover every combination."""
        kinds = self.kinds()
        nodes = (256 * MIB, 256 * MIB)
        # The last machine is filled up with the first combinations.
        starts = range(0, len(kinds), count)
        return [dimms_of((kinds + kinds)[n : n + count], nodes=nodes) for n in starts]

    def try_right(self, machines: Sequence[RawMachine]) -> None:
        """Try machines without a flaw."""
        self.try_all(machines)
        if self.outcomes != {"accepted": len(set(machines))}:
            raise ContractError(f"not all of the machines were accepted: {self.outcomes}")
        self.remark_unusual()

    def test_one(self) -> None:
        """Each kind of DIMM, alone in a machine, has the expected device-tree node."""
        self.try_right(self.machines_of(1))

    def test_two(self) -> None:
        """Each kind of DIMM, one of two, has the expected device-tree node."""
        self.try_right(self.machines_of(2))

    def test_all_slots(self) -> None:
        """Each kind of DIMM, one of 32, has the expected device-tree node."""
        self.try_right(self.machines_of(32))

    def test_slots(self) -> None:
        """Each slot has a connector in the tree, also without a DIMM."""
        machines = [dimms_of((), slots=slots) for slots in range(33)]
        self.try_right([*machines, RawMachine()])


class AnyMachine(TreeTest):
    """
    Random machines.

    :avocado: tags=device,device_tree
    """

    def test_memory(self) -> None:
        """QEMU refuses wrong memory or NUMA nodes with the reason; a valid machine has its tree."""
        others = {*BACKEND, *PROPERTY, *PLACE}
        self.try_reasons([reason for reason in FLAWS if reason not in others])

    def test_backends(self) -> None:
        """QEMU refuses a wrong backend with the reason; a valid machine has the expected tree."""
        self.try_reasons(BACKEND)

    def test_properties(self) -> None:
        """QEMU refuses a DIMM's wrong property with the reason; a valid machine has its tree."""
        self.try_reasons(PROPERTY)

    def test_places(self) -> None:
        """QEMU refuses a wrong slot or address with the reason; a valid machine has its tree."""
        self.try_reasons(PLACE)

    def try_reasons(self, reasons: Sequence[RefusalReason]) -> None:
        """Try machines, and require that QEMU gives each of these reasons."""
        source = self.random()
        began = time.monotonic()
        # Eight machines per batch: up to four with one flaw each, one of any kind, the rest valid.
        groups = [reasons[n : n + 4] for n in range(0, len(reasons), 4)]
        try:
            for group in groups:
                self.try_group(group, seed=source.getrandbits(64))
        finally:
            self.metric("machines", sum(self.outcomes.values()), "machines")
            self.measure("outcomes", dict(self.outcomes.most_common()))
            self.metric("duration", time.monotonic() - began, "s")
        # Each reason is the only one in as many machines as there are examples.
        unseen = [
            r.name
            for r in reasons
            if not any(r.name in names.split(" and ") for names in self.outcomes)
        ]
        self.remark_unusual()
        # A reason with another text is not recognised.
        if unseen and not self.unusual:
            raise ContractError(f"QEMU never gave the reason {', '.join(unseen)}")
        if 10 * self.outcomes["accepted"] < 3 * sum(self.outcomes.values()):
            raise ContractError(f"too few machines were accepted: {self.outcomes['accepted']}")

    def try_group(self, reasons: Sequence[RefusalReason], *, seed: int) -> None:
        """Try batches of machines: valid ones, and one for each of these reasons."""
        has_pmem = self.qemu.has_pmem and self.qemu.has_pmem_override
        valid = valid_machines(has_pmem, self.has_private)
        batch = st.tuples(
            *(flawed_machines(reason, has_pmem, self.has_private) for reason in reasons),
            *[valid] * (7 - len(reasons)),
            any_machines(has_pmem, self.has_private),
        )

        @hypothesis.seed(seed)
        @hypothesis.settings(
            max_examples=EXAMPLES,
            database=None,
            deadline=None,
            report_multiple_bugs=False,
            verbosity=hypothesis.Verbosity.quiet,
            suppress_health_check=list(hypothesis.HealthCheck),
            phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
        )
        @hypothesis.given(batch)
        def look(machines: tuple[RawMachine, ...]) -> None:
            self.try_all(machines)

        # Hypothesis stores its Unicode tables there.
        set_hypothesis_home_dir(self.place / "hypothesis")
        look()


class Distances(TreeTest):
    """
    NUMA distances of DIMMs.

    :avocado: tags=device,device_tree
    """

    def test_distances(self) -> None:
        """Linux sees the distance of two DIMMs' nodes, rounded to 20, 40, 80 or 160."""
        wrong = {}
        steps = ((20, 11, 30), (40, 31, 60), (80, 61, 120), (160, 121, 254))
        for rounded, *limits in steps:
            for away in (*limits, rounded):
                seen = self.distance_of(away)
                if seen != rounded:
                    wrong[away] = seen
        at_limits = {11: 160, 31: 160, 61: 160}
        if wrong and wrong != at_limits:
            raise ContractError(f"Linux's distance by configured distance: {wrong}")
        self.known_issue(
            "qemu-numa-distance-11-31-61",
            shows=bool(wrong),
            found=f"wrong distances, by configured distance: {wrong}",
        )

    def distance_of(self, away: int) -> int:
        """Linux's distance between two DIMMs whose nodes have the distance `away`."""
        pairs = [(PLAIN, RawDimm(node=node)) for node in (0, 1)]
        nodes = (256 * MIB, 256 * MIB)
        outcome = self.attempt(dimms_of(pairs, nodes=nodes, distances=((0, 1, away),)))
        if not outcome.accepted:
            raise ContractError(f"a distance of {away} was {outcome}")
        tree = parse_tree(outcome.tree or b"")
        cells = [tree.nvdimms[drc_index(n)].cells("ibm,associativity") for n in (0, 1)]
        if [c[-1] for c in cells] != [0, 1] or list(numa_differences(tree)):
            raise ContractError(f"at a distance of {away} the nodes 0 and 1 are {cells}")
        return distance(*cells)
