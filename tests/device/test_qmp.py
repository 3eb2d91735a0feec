# SPDX-License-Identifier: GPL-2.0-or-later
"""NVDIMMs in QEMU's monitor: reports, hotplug and refused commands; no guest runs.

QEMU's side is hw/mem/pc-dimm.c, hw/mem/nvdimm.c, hw/core/qdev.c and hw/ppc/spapr_nvdimm.c. The
refusals are those of the command line (paprscm/device/refusal_rows.py), and must change nothing;
a refusal for another reason than expected ends a test as WARN.
"""

import itertools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import UUID

from paprscm import timesheet
from paprscm.device.device_tree import parse_tree
from paprscm.device.expected_tree import associativity, expected_node, judge_persistent_memory
from paprscm.device.launch import attempt
from paprscm.device.refusal_rows import find_row
from paprscm.device.refusals import RefusalReason, board, names_one, reason_patterns
from paprscm.emulator.qmp import RefusedError
from paprscm.errors import ContractError, GuestLostError
from paprscm.host.process import describe_status
from paprscm.papr import MAX_SLOTS, SCM_BLOCK_SIZE, drc_index
from paprscm.testcase import QemuTest
from paprscm.vm.dimms import PLAIN, PMEM_OFF, SMALL
from paprscm.vm.machine import GIB, MIB, Machine, Nvdimm, Properties
from paprscm.vm.vm import Vm

NO_UUID = "00000000-0000-0000-0000-000000000000"
GOOD = PMEM_OFF.at(1)
"""The DIMM that is plugged, or that a changed property makes QEMU refuse."""

# By row of refusal_rows.py: the changed properties of GOOD's device; None removes a property.
BAD_DEVICES: Mapping[str, Mapping[str, str | int | None]] = {
    "slot in use": {"slot": 0},
    "slot 9 of 4": {"slot": 9},
    "slot -2 of 4": {"slot": -2},
    "slot of 2^31": {"slot": 1 << 31},
    "no label": {"label-size": None},
    "label of 64K": {"label-size": 64 << 10},
    "label not in whole pages": {"label-size": 131073},
    "label larger than the backend": {"label-size": GIB},
    "no uuid": {"uuid": None},
    "uuid of zeros": {"uuid": NO_UUID},
    "uuid of letters": {"uuid": "xyz"},
    "no memdev": {"memdev": None},
    "memdev not there": {"memdev": "mem7"},
    "memdev in use by a DIMM": {"memdev": "mem0"},
    "node 3 of 1": {"node": 3},
    "address in use": {"addr": GIB},
    "address not in whole pages": {"addr": 2 * GIB + 1},
}
# The same for GOOD's backend.
BAD_BACKENDS: Mapping[str, Mapping[str, str | int | None]] = {
    # With share=on QEMU accepts it: known_issues/qemu-nvdimm-on-volatile-file.md.
    "backend in memory": {"qom-type": "memory-backend-ram", "mem-path": None, "share": False},
    "read-only, but armed": {"readonly": True},
    "size no multiple": {"size": 300 * MIB},
}
REALIZED = (RefusalReason.FIXED, RefusalReason.READ_ONLY)
FIXED: Mapping[tuple[str, str], object] = {
    ("/machine/peripheral/nv0", "pmem-override"): True,
    ("/machine/peripheral/nv0", "unarmed"): True,
    ("/machine/peripheral/nv0", "slot"): 2,
    ("/machine/peripheral/nv0", "node"): 1,
    ("/machine/peripheral/nv0", "addr"): 2 * GIB,
    ("/machine/peripheral/nv0", "memdev"): "/objects/mem2",
    ("/machine/peripheral/nv0", "label-size"): 262144,
    ("/machine/peripheral/nv0", "size"): MIB,
    ("/machine/peripheral/nv0", "hotpluggable"): False,
    ("/objects/mem0", "size"): MIB,
    ("/objects/mem0", "share"): False,
    ("/objects/mem0", "pmem"): True,
    ("/objects/mem0", "mem-path"): "/other",
    ("/objects/mem0", "readonly"): True,
    ("/objects/mem0", "align"): 4096,
    ("/objects/mem0", "offset"): 4096,
    ("/objects/mem0", "rom"): "on",
}
"""Properties by QOM path and name, with a value other than the current one."""


def changed(properties: Properties, change: Mapping[str, str | int | None]) -> dict[str, Any]:
    """The properties with some changed; a property changed to None is removed."""
    return {name: value for name, value in {**properties, **change}.items() if value is not None}


def state(vm: Vm) -> dict[str, Any]:
    """The monitor's reports of memory, slots and devices."""
    qmp = vm.qmp
    reports = {name: qmp.execute(name) for name in ("query-memory-devices", "query-memdev")}
    reports["query-memory-size-summary"] = qmp.execute("query-memory-size-summary")
    for line in ("info memory_size_summary", "info ramblock"):
        reports[line] = qmp.hmp(line)
    for path in ("/machine/peripheral", "/objects"):
        reports[path] = sorted(item["name"] for item in qmp.execute("qom-list", path=path))
    return reports


def plugged(vm: Vm) -> dict[str, dict[str, Any]]:
    """query-memory-devices by the device's id."""
    entries = vm.qmp.execute("query-memory-devices")
    return {entry["data"]["id"]: {"kind": entry["type"], **entry["data"]} for entry in entries}


def dump_tree(vm: Vm) -> bytes:
    """The device tree blob of the last reset."""
    target = vm.scratch / "tree"
    vm.qmp.execute("dumpdtb", filename=str(target))
    return target.read_bytes()


def reset(vm: Vm, slot: int) -> bytes:
    """Reset the machine, and wait for a device tree with the DIMM that was plugged before.

    Returns: the tree.
    """
    vm.qmp.execute("system_reset")
    limit = time.monotonic() + 10
    while drc_index(slot) not in parse_tree(tree := dump_tree(vm)).nvdimms:
        if time.monotonic() > limit:
            raise ContractError(f"10 s after a reset the device tree has no DIMM in slot {slot}")
        # A reset that has rebuilt the device tree causes no event.
        timesheet.pause(0.01)
    return tree


class DeviceQmp(QemuTest):
    """
    NVDIMMs in the monitor.

    :avocado: tags=device
    """

    def check_refusal(
        self, what: str, vm: Vm, command: str, *reasons: RefusalReason, **arguments: Any
    ) -> None:
        """Check that QEMU refuses a command, and that the refusal changes nothing.

        Args:
            what: the name of the command's fault, for a report.
            vm: the machine.
            command: of its monitor.
            reasons: the refusal must name one of them.
            arguments: of the command.
        """
        before = state(vm)
        try:
            vm.qmp.execute(command, **arguments)
        except RefusedError as error:
            self.check_reason(f"{command} {arguments}", error.text, reasons)
            self.check_state(f"{what}, after the refusal", vm, before)
        else:
            self.check(
                f"{what}: QEMU's answer", "accepted", f"a refusal: {reason_patterns(reasons)}"
            )

    def check_answer(
        self, what: str, answer: Mapping[str, Any], reasons: Sequence[RefusalReason]
    ) -> None:
        """Check that an answer of the monitor is an error with a message that names a reason."""
        text = answer.get("error", {}).get("desc")
        if self.check(f"{what}: an error with a message in {answer}", bool(text), True):
            self.check_reason(what, text, reasons)

    def check_reason(self, what: str, text: str, reasons: Sequence[RefusalReason]) -> None:
        """Add a remark if a refusal names none of the expected reasons."""
        if not names_one(text, reasons):
            self.remark(f"refusal of {what}: {text!r}, expected {reason_patterns(reasons)}")

    def check_state(self, what: str, vm: Vm, before: Mapping[str, Any]) -> None:
        """Check that memory, slots and devices in the monitor are the same as before."""
        after = state(vm)
        for name, value in before.items():
            self.check(f"{what}: {name}", after[name], value)

    def check_dimm(self, vm: Vm, nvdimm: Nvdimm, *, hotplugged: bool) -> None:
        """Compare the monitor's report of one DIMM with its command line."""
        identity, memdev = f"nv{nvdimm.slot}", f"/objects/mem{nvdimm.slot}"
        path = f"/machine/peripheral/{identity}"
        expected: dict[str, Any] = {
            "unarmed": False,
            "pmem-override": False,
            **nvdimm.frontend(),
            "memdev": memdev,
            "type": nvdimm.device,
            "size": nvdimm.size_bytes,
            "node": 0,
            "hotplugged": hotplugged,
            "hotpluggable": True,
            "realized": True,
        }
        if nvdimm.device != "spapr-nvdimm" or not self.qemu.has_pmem_override:
            del expected["pmem-override"]
        backend = nvdimm.backend(vm.file(nvdimm.slot))
        properties = [(path, name, value) for name, value in expected.items()]
        properties += [(memdev, name, value) for name, value in backend.items()]
        properties += [(memdev, "type", backend["qom-type"])]
        for owner, name, value in properties:
            # These exist on the command line only.
            if name not in ("driver", "id", "qom-type"):
                current = vm.qmp.execute("qom-get", path=owner, property=name)
                self.check(f"{owner}.{name}", current, value)
        names = ("memdev", "slot", "size", "node", "hotplugged", "hotpluggable")
        entry = {"kind": "nvdimm", "id": identity, **{name: expected[name] for name in names}}
        entry["addr"] = vm.qmp.execute("qom-get", path=path, property="addr")
        self.check(f"query-memory-devices, {identity}", plugged(vm)[identity], entry)

    def test_told_as_asked(self) -> None:
        """Monitor and device tree report the DIMMs of the command line, also after a reset."""
        at_boot = (
            Nvdimm(slot=2, size_bytes=768 * MIB, label_bytes=256 << 10, unarmed=True),
            Nvdimm(slot=0, uuid="7f9b6a0e-52f5-4d0a-8d5c-0c3f1f0b9a11"),
            PLAIN.at(1, SMALL),
        )
        later = Nvdimm(
            slot=3,
            pmem=self.qemu.has_pmem,
            pmem_override=self.qemu.has_pmem_override,
            size_bytes=1024 * MIB,
        )
        vm = self.vm(Machine(memory_mib=256, slots=4, nvdimms=at_boot))
        nodes = {
            nvdimm.drc: expected_node(
                slot=nvdimm.slot,
                driver=nvdimm.device,
                pmem=nvdimm.pmem,
                pmem_override=nvdimm.pmem_override,
                uuid=nvdimm.guid,
                label_bytes=nvdimm.label_bytes,
                size_bytes=nvdimm.size_bytes,
                associativity=associativity(0),
            )
            for nvdimm in (*at_boot, later)
        }

        def compare(tree: bytes, with_later: bool) -> None:
            for nvdimm in (*at_boot, later) if with_later else at_boot:
                self.check_dimm(vm, nvdimm, hotplugged=nvdimm is later)
            expected = {drc: node for drc, node in nodes.items() if with_later or drc != later.drc}
            for line in judge_persistent_memory(parse_tree(tree), slots=4, nvdimms=expected):
                self.check("device tree", line, "as on the command line")
            self.checkpoint()

        compare(dump_tree(vm), False)
        vm.plug(later)
        before = state(vm)
        compare(reset(vm, later.slot), True)
        self.check_state("after a reset", vm, before)
        ranges = sorted((entry["addr"], entry["size"]) for entry in plugged(vm).values())
        for (address, size), (following, _) in itertools.pairwise((*ranges, (1 << 64, 0))):
            wrong = address < GIB or address % SCM_BLOCK_SIZE or address + size > following
            self.check(
                f"{address:#x} is outside its window, unaligned or overlaps, in {ranges}",
                bool(wrong),
                False,
            )
        summary = vm.qmp.execute("query-memory-size-summary")
        total = sum(nvdimm.size_bytes for nvdimm in (*at_boot, later))
        expected = {"base-memory": 256 * MIB, "plugged-memory": total}
        self.check("query-memory-size-summary", summary, expected)

    def test_properties_are_fixed(self) -> None:
        """The properties of a DIMM and of its backend cannot be set after their creation."""
        vm = self.vm(Machine(memory_mib=256, nvdimms=(PMEM_OFF.at(0), PMEM_OFF.at(2))))

        existing = {
            path: {item["name"] for item in vm.qmp.execute("qom-list", path=path)}
            for path in ("/machine/peripheral/nv0", "/objects/mem0")
        }
        for (path, name), value in FIXED.items():
            # Some properties are newer than QEMU 7.0, or need libpmem.
            if name not in existing[path]:
                continue
            what, words = f"{path}.{name}", {"path": path, "property": name}
            before = vm.qmp.execute("qom-get", **words)
            self.check_refusal(what, vm, "qom-set", *REALIZED, value=value, **words)
            self.check(f"{what} afterwards", vm.qmp.execute("qom-get", **words), before)

    def test_uuid_is_fixed(self) -> None:
        """The uuid of a DIMM cannot be changed after its creation, not even to zeros."""
        vm = self.vm(Machine(memory_mib=256, nvdimms=(PMEM_OFF,)))
        path = "/machine/peripheral/nv0"
        accepted = []
        for uuid in ("7f9b6a0e-52f5-4d0a-8d5c-0c3f1f0b9a11", NO_UUID):
            try:
                vm.qmp.execute("qom-set", path=path, property="uuid", value=uuid)
            except RefusedError:
                continue
            accepted.append(uuid)
        found = (
            f"qom-set makes the uuid of a running DIMM {' or '.join(accepted) or 'nothing else'}"
        )
        self.known_issue("qemu-nvdimm-uuid-settable", shows=bool(accepted), found=found)

    def test_realized_is_fixed(self) -> None:
        """A DIMM cannot be removed by setting its property realized to off."""
        vm = self.vm(Machine(memory_mib=256, nvdimms=(PMEM_OFF,)))
        issue, path = "qemu-nvdimm-unrealize-by-qom-set", "/machine/peripheral/nv0"
        try:
            vm.qmp.execute("qom-set", path=path, property="realized", value=False)
        except RefusedError as error:
            self.known_issue(issue, shows=False, found=str(error))
            return
        found = f"realized=off leaves {len(plugged(vm))} of 1 DIMM"
        try:
            vm.qmp.execute("qom-set", path=path, property="realized", value=True)
        except GuestLostError:
            status = vm.process.wait(5)
            end = "is stuck" if status is None else describe_status(status)
            found += f"; realized=on again: QEMU {end}:\n{vm.output()}"
        self.known_issue(issue, shows=True, found=found)

    def test_hotplug_refusals(self) -> None:
        """A refused device_add changes nothing, and its backend can be used afterwards."""
        vm = self.vm(Machine(memory_mib=256, slots=4, nvdimms=(PMEM_OFF.at(0),)))
        empty = state(vm)
        file = vm.scratch / "file"
        with file.open("wb") as opened:
            opened.truncate(GOOD.file_bytes)

        def plug_refused(name: str, properties: Mapping[str, Any]) -> None:
            self.check_refusal(name, vm, "device_add", *find_row(name).reasons, **properties)

        for name, change in BAD_BACKENDS.items():
            vm.qmp.execute("object-add", **changed(GOOD.backend(file), change))
            plug_refused(name, GOOD.frontend())
            self.checkpoint()
            vm.qmp.execute("object-del", id="mem1")
            self.check_state(f"{name}, its backend removed", vm, empty)
            self.checkpoint()
        vm.qmp.execute("object-add", **GOOD.backend(file))
        for name, change in BAD_DEVICES.items():
            plug_refused(name, changed(GOOD.frontend(), change))
        self.checkpoint()
        vm.qmp.execute("object-del", id="mem1")
        self.check_state("the backend removed", vm, empty)
        self.checkpoint()
        vm.qmp.execute("object-add", **GOOD.backend(file))
        vm.qmp.execute("device_add", **GOOD.frontend())
        self.expect("DIMMs after a good device_add", set(plugged(vm)), {"nv0", "nv1"})
        self.check_refusal("backend in use", vm, "object-del", RefusalReason.IN_USE, id="mem1")

    def test_hotplug_without_room(self) -> None:
        """A DIMM larger than the rest of maxmem is refused; one of that size is accepted."""
        machine = Machine(memory_mib=256, slots=4, nvdimms=(PMEM_OFF.at(0),))
        vm = self.vm(machine)
        before = state(vm)
        room = machine.dimm_room_bytes - machine.nvdimms[0].size_bytes
        try:
            vm.plug(PMEM_OFF.at(1, room + SCM_BLOCK_SIZE))
        except RefusedError as error:
            self.check_reason("device_add", error.text, [RefusalReason.NO_SPACE])
        else:
            raise ContractError(
                f"QEMU accepts a DIMM of {SCM_BLOCK_SIZE} bytes more than maxmem leaves"
            )
        self.check_state("after the refusal", vm, before)
        self.checkpoint()
        vm.plug(PMEM_OFF.at(1, room))

    def test_hotplug_without_nvdimms(self) -> None:
        """A machine with nvdimm=off refuses to plug a DIMM."""
        file = Path(self.workdir) / "file"
        with file.open("wb") as opened:
            opened.truncate(GOOD.file_bytes)
        commands = (("object-add", GOOD.backend(file)), ("device_add", GOOD.frontend()))
        outcome = attempt(self.qemu, board(), machine="nvdimm=off", commands=commands)
        outcome.returned(0)
        self.check_answer("device_add", outcome.answers[1], [RefusalReason.NVDIMM_OFF])

    def test_unplug(self) -> None:
        """device_del of a DIMM is always refused, and the DIMM stays."""
        vm = self.vm(Machine(memory_mib=256, nvdimms=(PMEM_OFF.at(0),)))
        vm.plug(GOOD)
        for name in ("nv0", "nv0", "nv1", "nv1"):
            self.check_refusal(
                f"unplug of {name}", vm, "device_del", RefusalReason.NO_UNPLUG, id=name
            )
        self.checkpoint()
        reset(vm, GOOD.slot)
        self.check("DIMMs after the next reset", set(plugged(vm)), {"nv0", "nv1"})

    def test_32_dimms(self) -> None:
        """32 DIMMs can be plugged, each in its slot; a 33rd is refused."""
        commands: list[tuple[str, Mapping[str, Any]]] = []
        for number in range(MAX_SLOTS + 1):
            # Nvdimm does not allow a 33rd slot, so QEMU chooses the slots.
            nvdimm = PMEM_OFF.at(number % MAX_SLOTS, SMALL)
            file = Path(self.workdir) / f"file{number}"
            with file.open("wb") as opened:
                opened.truncate(nvdimm.file_bytes)
            names: dict[str, str | int | None] = {"id": f"mem{number}"}
            commands.append(("object-add", changed(nvdimm.backend(file), names)))
            names = {"id": f"nv{number}", "memdev": f"mem{number}", "slot": None}
            names["uuid"] = str(UUID(int=number + 1))
            commands.append(("device_add", changed(nvdimm.frontend(), names)))
        commands.append(("query-memory-devices", {}))
        memory = f"256M,slots={MAX_SLOTS},maxmem=16G"
        outcome = attempt(self.qemu, board(memory=memory), commands=commands)
        self.metric("duration", outcome.duration_s, "s")
        for number in range(len(commands) - 2):
            outcome.returned(number)
        self.check_answer("33rd device_add", outcome.answers[-2], [RefusalReason.NO_FREE_SLOT])
        entries = [entry["data"] for entry in outcome.returned(len(commands) - 1)]
        dimms = sorted((entry["slot"], entry["id"], entry["addr"]) for entry in entries)
        expected = [(n, f"nv{n}", GIB + n * SCM_BLOCK_SIZE) for n in range(MAX_SLOTS)]
        self.check("slot, id and address of each DIMM", dimms, expected)
