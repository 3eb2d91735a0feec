# SPDX-License-Identifier: GPL-2.0-or-later
"""Capacity of a region: namespaces of all sizes, modes and alignments, against a model.

After each step, sysfs, ndctl and the label area of the backing file are compared with the model
(paprscm/labels/capacity.py).
"""

from __future__ import annotations

import re
import uuid as uuids
from collections import Counter
from dataclasses import replace
from pathlib import Path

from paprscm.channel.command import CommandResult
from paprscm.checks import matching
from paprscm.guest.guest import Guest
from paprscm.known_issues import IssueState, read_issue
from paprscm.labels.capacity import (
    PAGE_STRUCTURE,
    Capacity,
    Difference,
    Extent,
    Known,
    Outcome,
    Request,
)
from paprscm.labels.capacity_steps import Chooser, Step
from paprscm.labels.metadata import LABEL, LabelArea, StoredNamespace
from paprscm.labels.region_state import RegionState, read_state, run_and_read
from paprscm.pmem.namespaces import NamespaceMode
from paprscm.pmem.regions import Region, wait_for_region
from paprscm.testcase import PaprScmTest
from paprscm.vm.dimms import PMEM_OFF, PMEM_ON, SMALL
from paprscm.vm.machine import GIB, MIB, Machine, Nvdimm

OPERATIONS = 20
"""Steps of the default run; -p operations=N is another number."""
LARGE = 3 * GIB
FOR_LABELS = 9 * GIB
"""Enough for as many namespaces as the label area has slots."""
FREE_SLOTS = 3
UNIT = 16 * MIB
PAGE = 4096
SMALL_SIZES = tuple(UNIT * count for count in (1, 1, 2, 3, 4, 5))
LARGE_SIZES = tuple(UNIT * count for count in (1, 4, 32, 64, 64, 65, 128))
SEED_ISSUE = "linux-namespace-seed-lost"
GROWTH_ISSUE = "linux-namespace-growth-warns"
UNDERRUN = "allocation underrun"
HUGE_ISSUE = "linux-devdax-initializes-pages-of-others"
ORDER_ISSUE = "linux-namespaces-sorted-by-bytes"
SLOT_ISSUE = "linux-last-label-slot-taken"
ATE_LABEL = "we ate our last label"
READS = 20
"""Readings of a state before a device or the seed that is not there counts as missing."""
WARNING = r"WARNING: .*(?:size_store|grow_dpa_allocation|available_slots_show)\+"
# A namespace without a piece of memory that is aligned as requested.
REFUSALS = (
    r"unable to satisfy requested alignment",
    r"probe with driver \w+ failed with error -\d+",
    r"probe of \S+ failed with error -\d+",
)


class CapacityTest(PaprScmTest):
    """
    Namespaces of one region, and their model.

    :avocado: disable
    """

    timeout = 3600
    allowed: tuple[str, ...] = REFUSALS

    def start(self, nvdimm: Nvdimm) -> None:
        """Start a guest with an empty DIMM whose file outlives it."""
        self.nvdimm = nvdimm
        self.files = self.keep(nvdimm)
        self.marks: dict[str, int] = {}
        self.lost_seeds: list[str] = []
        self.boot_again()
        self.state: RegionState = read_state(self.guest, self.region)
        self.capacity = Capacity.of(self.state)

    def boot_again(self) -> None:
        """Start a guest on the backing file."""
        self.guest: Guest = self.boot(Machine(nvdimms=self.files.nvdimms()), allowed=self.allowed)
        self.region: Region = wait_for_region(self.guest, self.nvdimm.slot)

    @property
    def file(self) -> Path:
        """The backing file: the region, and the label area behind it."""
        return self.files.path(self.nvdimm.slot)

    def label_area(self) -> frozenset[StoredNamespace]:
        """The namespaces in the label area of the backing file."""
        data = self.label_bytes()
        if not data.strip(b"\0"):
            return frozenset()
        foreign = {extent.start for extent in self.capacity.foreign}
        stored = LabelArea.parse(data).namespaces()
        return frozenset(one for one in stored if one.offset not in foreign)

    def label_bytes(self) -> bytes:
        """Content of the label area."""
        with self.file.open("rb") as file:
            file.seek(self.nvdimm.size_bytes)
            return file.read(self.nvdimm.label_bytes)

    def make(self, number: int, step: Step) -> Outcome:
        """Make a step, and compare everything with the model."""
        judgement = step.judge(self.capacity)
        what = f"step {number}, {step}"
        self.log.info("%s: %s", what, judgement)
        if step.kind == "restart":
            self.guest.kill()
            self.boot_again()
            outcome, output = Outcome.SUCCESS, ""
            state = read_state(self.guest, self.region)
        else:
            result, state = self.command(step)
            outcome = Outcome.REFUSED if result.status else Outcome.SUCCESS
            output = result.stderr
        if judgement.outcome not in (outcome, Outcome.EITHER):
            detail = f"{judgement.reason}; {output}" if judgement.reason else output
            self.check(what, outcome.value, judgement.outcome.value, detail=detail)
            self.checkpoint()
        if outcome is Outcome.SUCCESS:
            if step.probes:
                self.capacity.probe()
                state = self.settled(what, state)
            self.effect(what, step, state)
        self.compare(what, state)
        self.state = state
        return outcome

    def command(self, step: Step) -> tuple[CommandResult, RegionState]:
        """Run a step's command; return its result, and the state behind it."""
        names = {uuid: one.name for uuid, one in self.state.namespaces.items()}
        return run_and_read(self.guest, self.region, step.command(self.region, names))

    def settled(self, what: str, state: RegionState) -> RegionState:
        """The state after a probe when all drivers are bound and the region has a seed.

        Drivers are bound asynchronously. A known issue is that the region remains without a seed;
        then the region is probed again.
        """
        for _ in range(READS):
            if state.has_seed and all(one.device for one in state.namespaces.values()):
                return state
            state = read_state(self.guest, self.region)
        if state.has_seed:
            return state
        self.lost_seeds.append(what)
        again = Step("rebind")
        return self.settled(f"{what}, {again}", self.command(again)[1])

    def effect(self, what: str, step: Step, state: RegionState) -> None:
        """Change the model as a successful step demands, and mark the data of a new namespace."""
        if step.kind in ("destroy", "reconfigure"):
            self.capacity.destroy(step.uuid)
            del self.marks[step.uuid]
        if step.kind in ("disable", "enable"):
            self.capacity.set_enabled(step.uuid, enabled=step.kind == "enable")
        if step.kind == "resize":
            # Behind a new end other namespaces may have their data.
            del self.marks[step.uuid]
            for name, found, expected in self.capacity.resize(step.uuid, step.size_bytes, state):
                self.check(f"{what}: {name}", found, expected)
            self.mark(step.uuid, self.capacity.namespaces[step.uuid])
        if step.request is not None:
            before = set(self.capacity.namespaces)
            for name, found, expected in self.capacity.adopt(step.request, state):
                self.check(f"{what}: {name}", found, expected)
            self.checkpoint()
            for uuid in set(self.capacity.namespaces) - before:
                self.mark(uuid, self.capacity.namespaces[uuid])

    def mark(self, uuid: str, known: Known) -> None:
        """Write to the middle of a namespace's data, in the backing file.

        The data of a sector namespace begin at its first quarter or before.
        """
        data = (
            known.extent
            if known.device.offset is None
            else Extent(known.device.offset, known.device.size_bytes)
        )
        share = 4 if known.device.offset is None else 2
        self.marks[uuid] = data.start + data.size // share // PAGE * PAGE
        with self.file.open("r+b") as file:
            file.seek(self.marks[uuid])
            file.write(uuid.encode())

    def compare(self, what: str, state: RegionState) -> None:
        """Compare a state, the label area and the marked data with the model."""
        differences: list[Difference] = []
        differences.extend(self.capacity.differences(state, self.label_area()))
        differences.append(("the seed is empty", state.has_seed, True))
        with self.file.open("rb") as file:
            for uuid, offset in self.marks.items():
                file.seek(offset)
                data = file.read(len(uuid))
                differences.append((f"data of {uuid} at {offset:#x}", data, uuid.encode()))
        for name, found, expected in differences:
            self.check(f"{what}: {name}", found, expected)
        self.checkpoint()

    def crashes(self, request: Request) -> bool:
        """Return True if a known issue crashes this kernel: huge pages with few page structures.

        tests/pmem/test_page_structures.py shows it.
        """
        state = read_issue(HUGE_ISSUE).state(self.versions()["Linux"])
        page = self.capacity.geometry.page_bytes
        is_huge = page < (request.align or 0) < 2 * page // PAGE_STRUCTURE * page
        wanted = (request.mode, request.map) == ("devdax", "mem")
        return state is not IssueState.FIXED and is_huge and wanted

    def random_steps(self, sizes: tuple[int, ...]) -> None:
        """Make random steps, and at the end a restart."""
        modes: list[NamespaceMode] = ["raw", "fsdax", "devdax"]
        # A BTT makes a thousand writes, which are flushed with pmem=off.
        if self.nvdimm.pmem:
            modes.append("sector")
        chooser = Chooser(self.random(), modes, sizes, leave_out=self.crashes)
        outcomes: Counter[str] = Counter()
        count = int(self.params.get("operations", default=OPERATIONS))
        for number in range(count):
            step = chooser.choose(self.capacity)
            outcomes[f"{step.kind} {self.make(number, step).value}"] += 1
        self.make(count, Step("restart"))
        self.metric("steps", count, "steps")
        self.measure("outcomes", dict(outcomes))
        self.log.info("outcomes: %s", dict(outcomes))
        if self.lost_seeds:
            found = f"no seed after {', '.join(self.lost_seeds)}"
            self.known_issue(SEED_ISSUE, shows=True, found=found)


class Namespaces(CapacityTest):
    """
    Random steps.

    :avocado: tags=namespace
    """

    def dimm(self, size_bytes: int) -> Nvdimm:
        """A DIMM with pmem=on, which is faster, if QEMU has it."""
        return (PMEM_ON if self.qemu.has_pmem else PMEM_OFF).at(0, size_bytes)

    def test_small(self) -> None:
        """A namespace that fits in a free extent keeps its range; a refusal changes nothing.

        On 256 MiB: namespaces of several sizes are created, destroyed, disabled, enabled, resized
        and reconfigured in random order; the region is disabled or its driver bound again, and the
        guest restarted. -p operations=N makes N steps.
        """
        self.start(self.dimm(SMALL))
        self.random_steps(SMALL_SIZES)

    def test_large(self) -> None:
        """On 3 GiB, with alignments of up to 1 GiB, a namespace keeps its range, or is refused."""
        self.start(self.dimm(LARGE))
        self.random_steps(LARGE_SIZES)


class Limits(CapacityTest):
    """
    Requests that the kernel must refuse.

    :avocado: tags=namespace
    """

    allowed = (*REFUSALS, WARNING)

    def warned(self, text: str) -> bool:
        """Return True if the kernel printed a text; check that it printed no other warning."""
        lines = self.guest.console.lines
        texts = sum(text in line for line in lines)
        warnings = sum(re.search(WARNING, line) is not None for line in lines)
        self.check(f"warnings about '{text}'", warnings, texts)
        return texts > 0

    def create(self, number: int, *, size: int = UNIT) -> str:
        """Create a raw namespace, which must succeed; return its uuid."""
        uuid = str(uuids.uuid4())
        request = Request(mode="raw", size_bytes=size, uuid=uuid)
        self.make(number, Step("create", request=request))
        return uuid

    def test_growth(self) -> None:
        """A namespace grows only into adjacent space; a refusal changes nothing, without a warning.

        drivers/nvdimm/namespace_devs.c, space_valid.
        """
        self.start(PMEM_OFF.at(0, SMALL))
        first, second, third = (self.create(number) for number in range(3))
        self.make(3, Step("disable", first))
        self.make(4, Step("resize", first, size_bytes=2 * UNIT))
        warned = self.warned(UNDERRUN)
        found = "a namespace that cannot grow in place is refused "
        found += "with a kernel warning" if warned else "without a warning"
        for number, step in enumerate(
            (
                Step("destroy", second),
                Step("resize", first, size_bytes=2 * UNIT),
                Step("enable", first),
                Step("disable", third),
                Step("resize", third, size_bytes=2 * UNIT),
                Step("resize", third, size_bytes=SMALL),
                Step("resize", third, size_bytes=3 * UNIT // 2),
                Step("resize", third, size_bytes=UNIT),
                Step("restart"),
            ),
            5,
        ):
            self.make(number, step)
        self.known_issue(GROWTH_ISSUE, shows=warned, found=found)

    def test_label_slots(self) -> None:
        """A namespace for which no slot of a label is free is refused, and changes nothing.

        All slots except a few hold labels of another region, as on a DIMM that had another uuid.
        One slot is the kernel's, for updates (drivers/nvdimm/dimm_devs.c, available_slots_show).
        """
        self.start(PMEM_OFF.at(0, FOR_LABELS))
        self.create(0)
        self.guest.kill()
        self.fill_labels()
        self.boot_again()
        self.state = read_state(self.guest, self.region)
        self.compare("with labels of another region", self.state)
        for number in range(1, FREE_SLOTS):
            last = self.create(number)
        request = Request(mode="raw", size_bytes=UNIT, uuid=str(uuids.uuid4()))
        self.make(FREE_SLOTS, Step("create", request=request))
        self.write_size(request)
        self.make(FREE_SLOTS + 1, Step("disable", last))
        self.make(FREE_SLOTS + 2, Step("resize", last, size_bytes=2 * UNIT))
        self.make(FREE_SLOTS + 3, Step("destroy", last))
        self.create(FREE_SLOTS + 4)
        self.make(FREE_SLOTS + 5, Step("restart"))
        self.check_order()

    def check_order(self) -> None:
        """Compare the order of the namespaces' numbers with that of their addresses."""
        namespaces = self.state.namespaces.values()
        offsets = {int(one.name.partition(".")[2]): one.stored.offset for one in namespaces}
        in_order = [hex(offset) for _number, offset in sorted(offsets.items())]
        self.known_issue(
            ORDER_ISSUE,
            shows=in_order != [hex(offset) for offset in sorted(offsets.values())],
            found=f"offsets in the order of the namespaces' numbers: {', '.join(in_order)}",
        )

    def fill_labels(self) -> None:
        """Fill all slots but FREE_SLOTS with labels of another region, and adapt the model."""
        area = LabelArea.parse(self.label_bytes())
        (used,) = area.used_slots()
        count = self.capacity.geometry.labels - FREE_SLOTS
        slots = [slot for slot in range(count + 1) if slot != used]
        own = area.label(used)
        labels = {
            slot: LABEL.changed(
                own,
                uuid=uuids.uuid4().int,
                slot=slot,
                dpa=LABEL.read(own, "dpa") + place * UNIT,
                isetcookie=LABEL.read(own, "isetcookie") ^ 1,
            )
            for place, slot in enumerate(slots, 1)
        }
        with self.file.open("r+b") as file:
            file.seek(self.nvdimm.size_bytes)
            file.write(area.filled(labels).data)
        geometry, known = self.capacity.geometry, self.capacity.namespaces
        self.capacity = Capacity(
            replace(geometry, labels=geometry.labels - len(labels)),
            [Extent(LABEL.read(label, "dpa"), UNIT) for label in labels.values()],
        )
        self.capacity.namespaces = known

    def write_size(self, request: Request) -> None:
        """Request the namespace in sysfs, where no check of ndctl precedes that of the kernel."""
        script = (
            f"cd {self.region.device} && read -r seed < namespace_seed && cd $seed && "
            f"/bin/echo {request.uuid} > uuid && {{ /bin/echo {request.size_bytes} > size; "
            f'echo "status $?"; }}'
        )
        result = self.guest.run(script)
        self.check("a write to size without a free slot", result.stdout, matching(r"^status [^0]"))
        state = read_state(self.guest, self.region)
        left = [
            place
            for place, stored in (("sysfs", state.stored), ("the label area", self.label_area()))
            if request.uuid in {one.uuid for one in stored}
        ]
        found = f"a refused namespace is in {' and '.join(left)}" if left else "nothing is left"
        if self.warned(ATE_LABEL):
            found += f"; the kernel warns: {ATE_LABEL}"
        if request.uuid in state.namespaces:
            name = state.namespaces[request.uuid].name
            self.guest.succeed(f"/bin/echo 0 > /sys/bus/nd/devices/{name}/size")
            state = read_state(self.guest, self.region)
        self.compare("after a refused write to size", state)
        self.state = state
        self.known_issue(SLOT_ISSUE, shows=bool(left), found=found)
