# SPDX-License-Identifier: GPL-2.0-or-later
"""DIMMs that are plugged into a guest while it boots.

At client-architecture-support (CAS) QEMU makes a new device tree with all DIMMs of the machine, and
discards the events of those that were plugged before (hw/ppc/spapr_hcall.c,
do_client_architecture_support). A DIMM that is plugged later is reported by an event alone: QEMU
queues it and triggers an interrupt (hw/ppc/spapr_events.c, spapr_hotplug_req_event). Linux requests
that interrupt at the end of its initcalls (arch/powerpc/platforms/pseries/ras.c,
init_ras_hotplug_IRQ). At each event-scan of Linux (arch/powerpc/kernel/rtasd.c: at first one a
second, then one in 30 s) QEMU triggers the interrupt again if events are pending.
"""

from __future__ import annotations

import re
import time
from collections.abc import Collection, Iterable
from dataclasses import replace

from paprscm.checks import at_least
from paprscm.emulator.qmp import RefusedError
from paprscm.errors import CapabilityError, ContractError
from paprscm.guest.boot_moments import Moment, reachable, visit
from paprscm.guest.guest import Guest
from paprscm.migration.moves import SyncedData, write_synced
from paprscm.papr import NODE, PARENT_NODE, SCM_BLOCK_SIZE, Property
from paprscm.pmem.dump import RegionError
from paprscm.pmem.mounts import dax_mount
from paprscm.pmem.regions import Region, wait_for_region
from paprscm.testcase import PaprScmTest
from paprscm.vm.dimms import PMEM_OFF, SMALL
from paprscm.vm.machine import Machine, Nvdimm
from paprscm.vm.vm import StartError

STOPPED = Moment("before the first instruction")
FIRMWARE = Moment("while the firmware runs", prints="SLOF")
KERNEL = Moment("before the kernel", "_stext", before_move=True)
BEFORE_CAS = Moment("before CAS", "prom_init", before_move=True)
# prom_init() calls it next after prom_send_capabilities().
AFTER_CAS = Moment("after CAS", "copy_and_flush", before_move=True)
START_KERNEL = Moment("before start_kernel", "start_kernel")
PMEM_INIT = Moment("before the nodes are probed", "__machine_initcall_pseries_pseries_pmem_init")
DRIVER_INIT = Moment("before papr_scm is registered", "papr_scm_init")
IRQ_INIT = Moment(
    "before the interrupt is requested", "__machine_initcall_pseries_init_ras_hotplug_IRQ"
)
AFTER_INITCALLS = Moment("after the initcalls", "free_initmem")
EVENT_SCAN = Moment("before an event-scan", "rtas_event_scan")
# Interrupts are disabled, and no other CPU can call RTAS (arch/powerpc/kernel/rtas.c, rtas_lock).
IN_EVENT_SCAN = Moment("in an event-scan", "enter_rtas")
INIT = Moment("while /init runs", prints="paprscm: init")
# Not moments of the boot.
RUNNING = Moment("after the boot")
RUNNING_BEFORE_RESET = Moment("before a reset")
STOPPED_BEFORE_RESET = Moment("into the stopped machine, before a reset")

UNTIL_IRQ = (
    STOPPED, KERNEL, BEFORE_CAS, AFTER_CAS, START_KERNEL, PMEM_INIT, DRIVER_INIT, IRQ_INIT
)  # fmt: skip
ALL = (STOPPED, FIRMWARE, *UNTIL_IRQ[1:], AFTER_INITCALLS, INIT)
MOUNTED = {BEFORE_CAS, AFTER_CAS, INIT, RUNNING_BEFORE_RESET}
"""The plugs whose DIMMs get a file system; one takes two seconds on a busy host."""
SLOTS = 16
NODES = 2
NO_EVENT_SCAN = "initcall_blacklist=rtas_event_scan_init"
APPEARS_S = 90.0
"""Time limit for a DIMM to appear, on a busy host, s. An event-scan is due every 30 s."""
LATE_S = 3.0
"""Time after the boot until a DIMM is late, s. An event takes about 50 ms."""
COMMAND_S = 120.0
"""Additional time limit for a command, on a busy host, s."""
INTERRUPTED = "/RAS_HOTPLUG$/ { for (i = 2; $i ~ /^[0-9]+$/; i++) count += $i } END { exit !count }"
"""A program for awk with status 0 if a hotplug event has caused an interrupt."""
SCANS = 4
"""vCPUs of a guest that waits for an event-scan."""
RESET_S = 60.0
"""Time limit for a reset, on a busy host, s."""


def dimm_of(slot: int, moment: Moment, nodes: int) -> Nvdimm:
    """The DIMM of a slot; neighbours differ in size and NUMA node, all in their uuid."""
    nvdimm = replace(PMEM_OFF.at(slot, SMALL * (1 + slot % 2)), node=slot % nodes)
    return nvdimm.holding("ext4") if moment in MOUNTED else nvdimm


class PlugDuringBoot(PaprScmTest):
    """
    A DIMM that is plugged at any moment of a boot.

    :avocado: tags=device_tree
    """

    def setUp(self) -> None:
        """Prepare the record of refused DIMMs."""
        super().setUp()
        self.refused: dict[Moment, str] = {}
        self.dimms: dict[Moment, Nvdimm] = {}
        """By the moment of the plug."""
        self.judged: set[Moment] = set()
        self.synced: dict[Moment, SyncedData] = {}
        """Data on the DIMMs that were mounted."""

    def moments(self, *moments: Moment) -> dict[Moment, int]:
        """The moments of this kernel's boot; a driver that is a module lacks its own."""
        equipment = self.environment.equipment
        if equipment.board.accel != "tcg":
            raise CapabilityError(
                "the boot is stopped by breakpoints, which need TCG: it does not write them into "
                "the guest's memory",
                hint="accel=tcg",
            )
        found = reachable(moments, equipment.payload.kernel)
        missing = [one for one in moments if one not in found]
        self.measure("moments left out", [str(one) for one in missing])
        if functions := [one.function for one in missing if one is not DRIVER_INIT]:
            raise CapabilityError(f"the kernel lacks the functions {', '.join(functions)}")
        return found

    def plug(self, guest: Guest, moment: Moment, nodes: int = NODES) -> None:
        """Plug the next DIMM; if QEMU refuses it, it must be nowhere."""
        nvdimm = self.dimms[moment] = dimm_of(len(self.dimms), moment, nodes)
        try:
            guest.plug(nvdimm)
        except RefusedError as error:
            self.refused[moment] = error.text
            devices = [one["data"]["id"] for one in guest.qmp.execute("query-memory-devices")]
            backends = [one["id"] for one in guest.qmp.execute("query-memdev")]
            self.check(f"{moment}: the refused device", nvdimm.frontend()["id"] in devices, False)
            self.check(f"{moment}: its backend", nvdimm.memdev in backends, False)

    def boot_with(
        self,
        moments: Iterable[Moment],
        *,
        firmware: str,
        option: str = "",
        word: str = "",
        idle: Collection[Moment] = (),
        smp: int | None = None,
    ) -> Guest:
        """Boot a guest, and plug a DIMM at each moment but the idle ones."""
        if firmware == "vof" and not self.environment.qemu.has_vof:
            raise CapabilityError("this QEMU has no VOF", hint="a QEMU with x-vof")
        found = self.moments(*moments)
        machine = Machine(
            slots=SLOTS,
            smp=smp,
            nodes=NODES,
            firmware=firmware,
            options=(option,) if option else (),
            cmdline=(word,) if word else (),
        )
        return self.boot(
            machine, shim=self.shim(), during_boot=lambda guest: self.visit(guest, found, idle=idle)
        )

    def visit(
        self,
        guest: Guest,
        moments: dict[Moment, int],
        *,
        idle: Collection[Moment] = (),
        nodes: int = NODES,
    ) -> None:
        """Continue a boot, and plug a DIMM at each moment but the idle ones."""

        def act(moment: Moment) -> None:
            if moment not in idle:
                self.plug(guest, moment, nodes)

        visit(guest, moments, act, limit_s=self.settings.boot_limit_s)

    def judge_all(self, guest: Guest) -> None:
        """Check that each DIMM is there; plug those again that QEMU has refused."""
        refused = {str(moment): text for moment, text in self.refused.items()}
        self.usual("plugs that QEMU refuses", refused, {})
        for moment in self.refused:
            guest.plug(self.dimms[moment])
        self.refused = {}
        for moment in self.dimms:
            if moment not in self.judged:
                self.judge(guest, moment)
                self.judged.add(moment)

    def judge(self, guest: Guest, moment: Moment) -> None:
        """Check region and NUMA node of a DIMM, and that its flushes reach the host."""
        nvdimm, region = self.dimms[moment], self.wait_for_region(guest, moment)
        node = region.node
        cells = node.raw.get(Property.ASSOCIATIVITY, b"")
        syncs = guest.vm.syncs(nvdimm.slot)
        before = syncs.counts().ended
        flush = f"cat {region.device}/target_node; echo 1 > {region.device}/deep_flush"
        target_node = guest.succeed(flush).strip()
        table = {
            "path": (node.path, f"/{PARENT_NODE}/{NODE}@{nvdimm.drc:08x}"),
            "uuid": (node.unit_guid, nvdimm.guid),
            "blocks": (node.number_of_blocks, nvdimm.size_bytes // SCM_BLOCK_SIZE),
            "size": (region.size_bytes, nvdimm.size_bytes),
            "label size": (node.metadata_size, nvdimm.label_bytes),
            "flush by hcall": (node.hcall_flush_required, True),
            "deep_flush": (region.deep_flush, "1"),
            # Its last cell is the node in each form of associativity (QEMU hw/ppc/spapr_numa.c).
            "ibm,associativity": (int.from_bytes(cells[-4:], "big"), nvdimm.node),
            "target_node": (target_node, str(nvdimm.node)),
            "syncs by deep_flush": (syncs.counts().ended - before, 1),
        }
        if moment in MOUNTED:
            table["syncs by mount and fsync"] = (self.write(guest, moment), at_least(1))
        for name, (found, expected) in table.items():
            self.check(f"plugged {moment}: {name}", found, expected)

    def wait_for_region(self, guest: Guest, moment: Moment) -> Region:
        """Wait for the region of a DIMM; the error names the moment of the plug."""
        try:
            return wait_for_region(guest, self.dimms[moment].slot, APPEARS_S)
        except RegionError as error:
            error.message = f"plugged {moment}: {error.message}"
            raise

    def write(self, guest: Guest, moment: Moment) -> int:
        """Mount a DIMM with DAX, compare what was written before, and write; return its syncs."""
        slot = self.dimms[moment].slot
        old = self.synced.get(moment)
        before = guest.vm.syncs(slot).counts().ended
        mountpoint = f"/mnt/slot{slot}"
        dax_mount(guest, slot, "ext4", mountpoint, reuse=old is not None)
        file = f"{mountpoint}/file"
        if old is not None:
            content = guest.succeed(f"od -An -v -tx1 {file} | tr -d ' \\n'")
            self.check(f"plugged {moment}: its data are there", content == old.content.hex(), True)
        self.synced[moment] = write_synced(guest, slot, file)
        return guest.vm.syncs(slot).counts().ended - before

    def test_vof(self) -> None:
        """A DIMM that is plugged before, during or after CAS is there after the boot, with VOF.

        It has its size, uuid and NUMA node, and its flushes reach the host. If its event is pending
        when the kernel has booted, it appears with one of the next event-scans.
        """
        guest = self.boot_with(UNTIL_IRQ, firmware="vof")
        began = time.monotonic()
        for moment in self.dimms:
            self.wait_for_region(guest, moment)
        self.metric("last_dimm_appears", time.monotonic() - began, "s")
        self.judge_all(guest)

    def test_slof(self) -> None:
        """A DIMM that is plugged at any moment until /init runs is there, with SLOF."""
        self.judge_all(self.boot_with(ALL, firmware="slof"))

    def test_xics(self) -> None:
        """With XICS a DIMM that is plugged after CAS appears without an event-scan."""
        self.check("the DIMM appears", self.appears_without_event_scan("xics", APPEARS_S), True)

    def test_xive(self) -> None:
        """With XIVE a DIMM that is plugged after CAS appears without an event-scan."""
        try:
            appears = self.appears_without_event_scan("xive", LATE_S)
        except StartError as error:
            if "XIVE-only machines require" not in error.message:
                raise
            raise CapabilityError("this CPU has no XIVE", hint="cpu=POWER9") from error
        self.known_issue(
            "linux-plug-during-boot-late",
            shows=not appears,
            found="without event-scans a DIMM that was plugged after CAS "
            + ("appears" if appears else f"is not there {LATE_S:g} s after the boot"),
        )

    def appears_without_event_scan(self, controller: str, limit_s: float) -> bool:
        """Boot a guest without event-scans, and plug a DIMM after CAS.

        The next DIMM, which is plugged after the boot, must bring both.

        Args:
            controller: the interrupt controller.
            limit_s: time after the boot, by the guest's clock, s.

        Returns:
            True if the DIMM, or an interrupt for it, arrives within that time.
        """
        option = f"ic-mode={controller}"
        guest = self.boot_with([AFTER_CAS], firmware="vof", option=option, word=NO_EVENT_SCAN)
        skipped = guest.succeed("dmesg | grep -c 'initcall rtas_event_scan_init blacklisted'")
        self.expect("initcalls of the event-scan that were skipped", skipped.strip(), "1")
        drc = self.dimms[AFTER_CAS].drc
        # With an interrupt the DIMM is only a matter of time.
        output = guest.succeed(
            f"for _ in $(seq {limit_s:.0f}); do\n"
            f"if [ -d /proc/device-tree/{PARENT_NODE}/{NODE}@{drc:08x} ] || awk '{INTERRUPTED}' "
            "/proc/interrupts; then echo appears; break; fi\n"
            # Its absence causes no event.
            "sleep 1\n"
            "done",
            timeout_s=limit_s + COMMAND_S,
        )
        appears = output.strip() == "appears"
        if appears:
            self.judge_all(guest)
        self.plug(guest, RUNNING)
        self.judge_all(guest)
        return appears

    def test_event_scan(self) -> None:
        """The event of a DIMM that is plugged during an event-scan is handled once.

        The event-scan triggers the interrupt of a pending event again, so that two interrupts have
        one event.
        """
        moments = AFTER_INITCALLS, EVENT_SCAN, IN_EVENT_SCAN
        # At first there is one event-scan a second for each CPU; the next one is due 30 s later.
        guest = self.boot_with(moments, firmware="vof", idle=moments[:2], smp=SCANS)
        # Events are handled in the order of their interrupts: then all of the first DIMM are done.
        self.plug(guest, RUNNING)
        self.judge_all(guest)
        log = guest.succeed("grep -E 'RAS_HOTPLUG$' /proc/interrupts; dmesg")
        line, _, messages = log.partition("\n")
        interrupts = sum(int(word) for word in line.split()[1 : 1 + SCANS])
        drc = f"{self.dimms[IN_EVENT_SCAN].drc:x}"
        failed = re.findall(rf"pseries-pmem: (Failed .* drc index: {drc})", messages)
        reports = ", ".join(failed) or "no message"
        self.measure("interrupts of two events", interrupts)
        if interrupts > len(self.dimms) or failed:
            self.known_issue(
                "linux-hotplug-event-handled-twice",
                shows=bool(failed),
                found=f"two events with {interrupts} interrupts: {reports}",
            )

    def test_reset(self) -> None:
        """A DIMM that is plugged shortly before a reset or until the next CAS is there afterwards.

        So are DIMMs that the guest had before, with their data.
        """
        moments = self.moments(STOPPED, KERNEL, BEFORE_CAS, AFTER_CAS)
        guest = self.boot(Machine(), shim=self.shim())
        self.plug(guest, RUNNING_BEFORE_RESET, nodes=1)
        self.judge_all(guest)
        # The suite's guests end with the first reset (-no-reboot).
        guest.qmp.execute("set-action", reboot="reset")
        guest.qmp.execute("stop")
        self.plug(guest, STOPPED_BEFORE_RESET, nodes=1)
        lines = guest.console.line_count
        guest.qmp.execute_until("system_reset", "RESET", lambda _: True, limit_s=RESET_S)
        self.visit(guest, moments, nodes=1)
        self.wait_ready(guest, lines)
        self.judged.clear()
        self.judge_all(guest)

    def wait_ready(self, guest: Guest, start: int) -> None:
        """Wait until /init reports that a guest has booted, after the first `start` lines."""
        guest.console.restart_silence()
        line = guest.console.wait_for(
            {"ready": re.compile("^paprscm: ready")},
            timeout_s=self.settings.boot_limit_s,
            silence_s=self.settings.silence_limit_s,
            start=start,
        )
        if line is None:
            guest.check()
            raise ContractError(f"the guest does not boot after a reset:\n{guest.console.tail()}")
