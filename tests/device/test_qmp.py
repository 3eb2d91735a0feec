# SPDX-License-Identifier: GPL-2.0-or-later
"""What QEMU's monitor tells of NVDIMMs, and what it lets be done to them; no guest runs.

QEMU's side is hw/mem/pc-dimm.c, hw/mem/nvdimm.c, hw/core/qdev.c and hw/ppc/spapr_nvdimm.c. The
refusals are those of the command line (paprscm/device/refusal_rows.py), and must leave nothing
behind; a refusal in other words than those seen so far ends a test as WARN.
"""

import itertools
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from paprscm.device.device_tree import associativity, expected_node, judge_persistent_memory, parse
from paprscm.device.launch import attempt
from paprscm.device.refusal_rows import find
from paprscm.device.refusals import Message, board
from paprscm.errors import ContractError, GuestLostError
from paprscm.host.process import describe_status
from paprscm.papr import MAX_SLOTS, SCM_BLOCK_SIZE
from paprscm.testcase import QemuTest
from paprscm.vm.machine import GIB, MIB, Machine, Nvdimm, Properties
from paprscm.vm.qmp import RefusedError
from paprscm.vm.vm import Vm

NO_UUID = "00000000-0000-0000-0000-000000000000"
GOOD = Nvdimm(slot=1)
"""What is plugged, or nearly."""

# The row of refusal_rows.py, and what is changed of GOOD's device; None leaves a property out.
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
# The same of GOOD's backend.
BAD_BACKENDS: Mapping[str, Mapping[str, str | int | None]] = {
    # With share=on it is taken, see known_issues/qemu-nvdimm-on-volatile-file.
    "backend in memory": {"qom-type": "memory-backend-ram", "mem-path": None, "share": False},
    "read-only, but armed": {"readonly": True},
    "size no multiple": {"size": 300 * MIB},
}
# The change was somewhere in between.
IN_USE = (
    Message("object 'mem1' is in use, can not be deleted", until=(10, 1)),
    Message("Cannot delete host memory backend 'mem1' which is mapped", since=(10, 1)),
)

NO_UNPLUG = "nvdimm device hot unplug is not supported yet."
_REALIZED = "on device 'nv0' (type 'spapr-nvdimm') after it was realized"
_BACKEND = "of memory-backend-file"
FIXED: Mapping[tuple[str, str], tuple[object, str]] = {
    **{
        ("/machine/peripheral/nv0", name): (
            value,
            f"Attempt to set property '{name}' {_REALIZED}",
        )
        for name, value in {
            "pmem-override": True,
            "unarmed": True,
            "slot": 2,
            "node": 1,
            "addr": 2 * GIB,
        }.items()
    },
    ("/machine/peripheral/nv0", "memdev"): (
        "/objects/mem2",
        f"Attempt to set link property 'memdev' {_REALIZED}",
    ),
    ("/machine/peripheral/nv0", "label-size"): (262144, "cannot change property value"),
    ("/machine/peripheral/nv0", "size"): (MIB, "Property 'spapr-nvdimm.size' is not writable"),
    ("/machine/peripheral/nv0", "hotpluggable"): (
        False,
        "Property 'spapr-nvdimm.hotpluggable' is not writable",
    ),
    ("/objects/mem0", "size"): (MIB, f"cannot change property size {_BACKEND} "),
    ("/objects/mem0", "share"): (False, "cannot change property value"),
    ("/objects/mem0", "pmem"): (True, f"cannot change property 'pmem' {_BACKEND}."),
    ("/objects/mem0", "mem-path"): ("/other", f"cannot change property 'mem-path' {_BACKEND}"),
    ("/objects/mem0", "readonly"): (True, f"cannot change property 'readonly' {_BACKEND}."),
    ("/objects/mem0", "align"): (4096, f"cannot change property 'align' {_BACKEND}"),
    ("/objects/mem0", "offset"): (4096, f"cannot change property 'offset' {_BACKEND}"),
    ("/objects/mem0", "rom"): ("on", f"cannot change property 'rom' {_BACKEND}."),
}
"""Properties by QOM path and name: a value that they do not have, and what QEMU must say to it."""


def changed(properties: Properties, change: Mapping[str, str | int | None]) -> dict[str, Any]:
    """The properties with some changed, and those that are None left out."""
    return {name: value for name, value in {**properties, **change}.items() if value is not None}


def state(vm: Vm) -> dict[str, Any]:
    """All that the monitor tells of memory, slots and devices."""
    qmp = vm.qmp
    found = {name: qmp.execute(name) for name in ("query-memory-devices", "query-memdev")}
    found["query-memory-size-summary"] = qmp.execute("query-memory-size-summary")
    for line in ("info memory_size_summary", "info ramblock"):
        found[line] = qmp.hmp(line)
    for path in ("/machine/peripheral", "/objects"):
        found[path] = sorted(item["name"] for item in qmp.execute("qom-list", path=path))
    return found


def plugged(vm: Vm) -> dict[str, dict[str, Any]]:
    """query-memory-devices by the device's id."""
    entries = vm.qmp.execute("query-memory-devices")
    return {entry["data"]["id"]: {"kind": entry["type"], **entry["data"]} for entry in entries}


def dump_tree(vm: Vm) -> bytes:
    """The device tree blob as QEMU has it now: that of the last reset."""
    target = vm.scratch / "tree"
    vm.qmp.execute("dumpdtb", filename=str(target))
    return target.read_bytes()


def reset(vm: Vm, slot: int) -> bytes:
    """Reset the machine, and wait for the tree that has the DIMM that was plugged before.

    Returns: the tree.
    """
    vm.qmp.execute("system_reset")
    limit = time.monotonic() + 10
    while Nvdimm(slot=slot).drc not in parse(tree := dump_tree(vm)).nvdimms:
        if time.monotonic() > limit:
            raise ContractError(f"10 s after a reset the device tree has no DIMM in slot {slot}")
        time.sleep(0.01)
    return tree


class DeviceQmp(QemuTest):
    """
    NVDIMMs as the monitor has them.

    :avocado: tags=device
    """

    def refused(self, vm: Vm, command: str, wanted: str, **arguments: Any) -> str | None:
        """What is wrong about how QEMU refuses a command; None when it is as it must be.

        Args:
            vm: whose monitor.
            command: to it.
            wanted: the words of the refusal so far.
            arguments: of the command.
        """
        before = state(vm)
        try:
            vm.qmp.execute(command, **arguments)
        except RefusedError as error:
            after = state(vm)
            self.usual(f"refusal of {command} {arguments}", error.text, wanted)
            moved = [
                f"{name}: {before[name]}, then {after[name]}"
                for name in before
                if before[name] != after[name]
            ]
            return "refused, but it has changed\n    " + "\n    ".join(moved) if moved else None
        return f"QEMU takes it; expected:\n    {wanted}"

    def refusal(self, what: str, answer: Mapping[str, Any], wanted: str) -> None:
        """An answer of the monitor must be an error with a reason; so far in these words."""
        if not (said := answer.get("error", {}).get("desc")):
            self.fail(f"{what}: QEMU takes it, {answer}; expected:\n    {wanted}")
        self.usual(f"refusal of {what}", said, wanted)

    def judge(self, found: Iterable[tuple[str, str | None]]) -> None:
        """FAIL with every difference, by what it is of."""
        wrong = [f"{name}: {difference}" for name, difference in found if difference]
        if wrong:
            self.fail("\n".join(wrong))

    def told(self, vm: Vm, nvdimm: Nvdimm, *, hotplugged: bool) -> Iterable[tuple[str, str | None]]:
        """Compare what QEMU tells of one DIMM with what was asked for."""
        identity, memdev = f"nv{nvdimm.slot}", f"/objects/mem{nvdimm.slot}"
        path = f"/machine/peripheral/{identity}"
        wanted: dict[str, Any] = {
            "unarmed": False,
            **({"pmem-override": False} if nvdimm.device == "spapr-nvdimm" else {}),
            **nvdimm.frontend(),
            "memdev": memdev,
            "type": nvdimm.device,
            "size": nvdimm.size_bytes,
            "node": 0,
            "hotplugged": hotplugged,
            "hotpluggable": True,
            "realized": True,
        }
        if not self.qemu.has_pmem_override:
            wanted.pop("pmem-override", None)
        backend = nvdimm.backend(vm.file(nvdimm.slot))
        asked = [(path, name, value) for name, value in wanted.items()]
        asked += [(memdev, name, value) for name, value in backend.items()]
        asked += [(memdev, "type", backend["qom-type"])]
        for where, name, value in asked:
            if name not in ("driver", "id", "qom-type"):
                said = vm.qmp.execute("qom-get", path=where, property=name)
                yield f"{where}.{name}", None if said == value else f"{said!r}, asked: {value!r}"
        names = ("memdev", "slot", "size", "node", "hotplugged", "hotpluggable")
        entry = {"kind": "nvdimm", "id": identity, **{name: wanted[name] for name in names}}
        entry["addr"] = vm.qmp.execute("qom-get", path=path, property="addr")
        said = plugged(vm)[identity]
        yield f"query-memory-devices, {identity}", None if said == entry else f"{said}, not {entry}"

    def test_told_as_asked(self) -> None:
        """Monitor and device tree tell what was asked for, and a reset changes nothing of it."""
        there = (
            Nvdimm(slot=2, size_bytes=768 * MIB, label_bytes=256 << 10, unarmed=True),
            Nvdimm(slot=0, uuid="7f9b6a0e-52f5-4d0a-8d5c-0c3f1f0b9a11"),
            Nvdimm(slot=1, device="nvdimm", size_bytes=256 * MIB),
        )
        later = Nvdimm(
            slot=3,
            pmem=self.qemu.has_pmem,
            pmem_override=self.qemu.has_pmem_override,
            size_bytes=1024 * MIB,
        )
        vm = self.vm(Machine(memory_mib=256, slots=4, nvdimms=there))
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
            for nvdimm in (*there, later)
        }

        def compare(tree: bytes, with_later: bool) -> None:
            for nvdimm in (*there, later) if with_later else there:
                self.judge(self.told(vm, nvdimm, hotplugged=nvdimm is later))
            wanted = {drc: node for drc, node in nodes.items() if with_later or drc != later.drc}
            wrong = judge_persistent_memory(parse(tree), slots=4, nvdimms=wanted)
            self.judge(("device tree", line) for line in wrong)

        compare(dump_tree(vm), False)
        vm.plug(later)
        before = state(vm)
        compare(reset(vm, later.slot), True)
        if state(vm) != before:
            self.fail(f"a reset makes of\n{before}\n{state(vm)}")
        ranges = sorted((entry["addr"], entry["size"]) for entry in plugged(vm).values())
        for (address, size), (following, _) in itertools.pairwise((*ranges, (1 << 64, 0))):
            if address < GIB or address % SCM_BLOCK_SIZE or address + size > following:
                self.fail(f"DIMMs at wrong addresses, (address, size): {ranges}")
        summary = vm.qmp.execute("query-memory-size-summary")
        total = sum(nvdimm.size_bytes for nvdimm in (*there, later))
        if summary != {"base-memory": 256 * MIB, "plugged-memory": total}:
            self.fail(f"query-memory-size-summary says {summary}; {total} bytes are plugged")

    def test_properties_are_fixed(self) -> None:
        """What QEMU has looked at when it made a DIMM or its backend cannot be set any more."""
        vm = self.vm(Machine(memory_mib=256, nvdimms=(Nvdimm(slot=0), Nvdimm(slot=2))))

        def difference(path: str, name: str, value: object, wanted: str) -> str | None:
            before = vm.qmp.execute("qom-get", path=path, property=name)
            found = self.refused(vm, "qom-set", wanted, path=path, property=name, value=value)
            after = vm.qmp.execute("qom-get", path=path, property=name)
            return found or (f"is {after!r} now, was {before!r}" if after != before else None)

        there = {
            path: {item["name"] for item in vm.qmp.execute("qom-list", path=path)}
            for path in ("/machine/peripheral/nv0", "/objects/mem0")
        }
        self.judge(
            (f"{path}.{name}", difference(path, name, value, wanted))
            for (path, name), (value, wanted) in FIXED.items()
            # Some have come later, or need libpmem.
            if name in there[path]
        )

    def test_uuid_is_fixed(self) -> None:
        """The uuid of a DIMM cannot be set any more; that of zeros never."""
        vm = self.vm(Machine(memory_mib=256, nvdimms=(Nvdimm(),)))
        path = "/machine/peripheral/nv0"
        taken = []
        for uuid in ("7f9b6a0e-52f5-4d0a-8d5c-0c3f1f0b9a11", NO_UUID):
            try:
                vm.qmp.execute("qom-set", path=path, property="uuid", value=uuid)
            except RefusedError:
                continue
            taken.append(uuid)
        found = f"qom-set makes the uuid of a running DIMM {' or '.join(taken) or 'nothing else'}"
        self.known_issue("qemu-nvdimm-uuid-settable", shows=bool(taken), found=found)

    def test_realized_is_fixed(self) -> None:
        """A DIMM cannot be taken away by its property realized."""
        vm = self.vm(Machine(memory_mib=256, nvdimms=(Nvdimm(),)))
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
            how = "is stuck" if status is None else describe_status(status)
            found += f"; realized=on again: QEMU {how}:\n{vm.says()}"
        self.known_issue(issue, shows=True, found=found)

    def test_hotplug_refusals(self) -> None:
        """A refused device_add leaves nothing behind, and its backend is as good as before."""
        vm = self.vm(Machine(memory_mib=256, slots=4, nvdimms=(Nvdimm(slot=0),)))
        empty = state(vm)
        file = vm.scratch / "file"
        with file.open("wb") as opened:
            opened.truncate(GOOD.file_bytes)

        def difference(name: str, properties: Mapping[str, Any]) -> str | None:
            places = {"memdev": str(properties.get("memdev"))}
            wanted = find(name).expected(self.qemu.version, places)
            return self.refused(vm, "device_add", wanted, **properties)

        for name, change in BAD_BACKENDS.items():
            vm.qmp.execute("object-add", **changed(GOOD.backend(file), change))
            self.judge([(name, difference(name, GOOD.frontend()))])
            vm.qmp.execute("object-del", id="mem1")
            if state(vm) != empty:
                self.fail(f"{name}: with its backend removed, {empty} has become {state(vm)}")
        vm.qmp.execute("object-add", **GOOD.backend(file))
        self.judge(
            (name, difference(name, changed(GOOD.frontend(), change)))
            for name, change in BAD_DEVICES.items()
        )
        vm.qmp.execute("object-del", id="mem1")
        if state(vm) != empty:
            self.fail(f"with the backend removed, {empty} has become {state(vm)}")
        vm.qmp.execute("object-add", **GOOD.backend(file))
        vm.qmp.execute("device_add", **GOOD.frontend())
        if set(plugged(vm)) != {"nv0", "nv1"}:
            self.fail(f"a good device_add after the bad ones makes {plugged(vm)}")
        (in_use,) = (message.text for message in IN_USE if message.holds(self.qemu.version))
        self.judge([("object-del", self.refused(vm, "object-del", in_use, id="mem1"))])

    def test_hotplug_without_room(self) -> None:
        """A DIMM larger than what is left of maxmem is refused, one of that size is taken."""
        machine = Machine(memory_mib=256, slots=4, nvdimms=(Nvdimm(slot=0),))
        vm = self.vm(machine)
        before = state(vm)
        total = (machine.maxmem_mib - machine.memory_mib) * MIB
        room = total - machine.nvdimms[0].size_bytes
        wanted = (
            f"not enough space, currently {machine.nvdimms[0].size_bytes:#x} in use of total space "
            f"for memory devices {total:#x}"
        )
        try:
            vm.plug(Nvdimm(slot=1, size_bytes=room + SCM_BLOCK_SIZE))
        except RefusedError as error:
            self.usual("refusal", error.text, wanted)
        else:
            self.fail(f"QEMU finds room for {SCM_BLOCK_SIZE} bytes more than there is")
        if state(vm) != before:
            self.fail(f"the refusal makes of\n{before}\n{state(vm)}")
        vm.plug(Nvdimm(slot=1, size_bytes=room))

    def test_hotplug_without_nvdimms(self) -> None:
        """A machine with nvdimm=off refuses a DIMM that is plugged as well."""
        file = Path(self.workdir) / "file"
        with file.open("wb") as opened:
            opened.truncate(GOOD.file_bytes)
        commands = (("object-add", GOOD.backend(file)), ("device_add", GOOD.frontend()))
        found = attempt(self.qemu, board(), machine="nvdimm=off", commands=commands)
        found.returned(0)
        wanted = find("spapr-nvdimm on a machine with nvdimm=off").expected(self.qemu.version, {})
        self.refusal("device_add", found.answers[1], wanted)

    def test_unplug(self) -> None:
        """device_del of a DIMM is refused, again and again, and the DIMM stays."""
        vm = self.vm(Machine(memory_mib=256, nvdimms=(Nvdimm(slot=0),)))
        vm.plug(GOOD)
        self.judge(
            (f"device_del {name}, time {n}", self.refused(vm, "device_del", NO_UNPLUG, id=name))
            for name in ("nv0", "nv1")
            for n in (1, 2)
        )
        reset(vm, GOOD.slot)
        if set(plugged(vm)) != {"nv0", "nv1"}:
            self.fail(f"after the next reset there is {plugged(vm)}")

    def test_32_dimms(self) -> None:
        """32 DIMMs can be plugged one after the other, each in its slot; a 33rd is refused."""
        commands: list[tuple[str, Mapping[str, Any]]] = []
        for number in range(MAX_SLOTS + 1):
            # There is no Nvdimm for a 33rd slot; QEMU chooses here.
            nvdimm = Nvdimm(slot=number % MAX_SLOTS, size_bytes=SCM_BLOCK_SIZE)
            file = Path(self.workdir) / f"file{number}"
            with file.open("wb") as opened:
                opened.truncate(nvdimm.file_bytes)
            names: dict[str, str | int | None] = {"id": f"mem{number}"}
            commands.append(("object-add", changed(nvdimm.backend(file), names)))
            names = {"id": f"nv{number}", "memdev": f"mem{number}", "slot": None}
            commands.append(("device_add", changed(nvdimm.frontend(), names)))
        commands.append(("query-memory-devices", {}))
        memory = f"256M,slots={MAX_SLOTS},maxmem=16G"
        found = attempt(self.qemu, board(memory=memory), commands=commands)
        self.measure("duration_s", found.duration_s)
        for number in range(len(commands) - 2):
            found.returned(number)
        wanted = find("no free slot").expected(self.qemu.version, {})
        self.refusal("the 33rd device_add", found.answers[-2], wanted)
        entries = [entry["data"] for entry in found.returned(len(commands) - 1)]
        told = sorted((entry["slot"], entry["id"], entry["addr"]) for entry in entries)
        expected = [(n, f"nv{n}", GIB + n * SCM_BLOCK_SIZE) for n in range(MAX_SLOTS)]
        if told != expected:
            self.fail(f"(slot, id, address): {told}, expected: {expected}")
