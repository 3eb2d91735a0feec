# SPDX-License-Identifier: GPL-2.0-or-later
"""Base classes of the suite's tests: `PaprScmTest`, and `QemuTest` for those without a guest."""

from __future__ import annotations

import contextlib
import functools
import random
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from avocado import Test
from avocado.core.exceptions import TestCancel, TestWarn

from paprscm import settings, timesheet
from paprscm.checks import Difference, describe, differ
from paprscm.debian.packages import Archive
from paprscm.emulator import binary
from paprscm.emulator.binary import Qemu
from paprscm.emulator.capabilities import sanitizers
from paprscm.errors import CapabilityError, ContractError, Error, HostError
from paprscm.guest.environment import Environment, prepare
from paprscm.guest.guest import Guest
from paprscm.hcall.bare_metal import BareMachine, compile_program
from paprscm.host.cache import Cache
from paprscm.known_issues import IssueState, read_issue
from paprscm.map_sync.verdict import MapSyncReport, Verdict, judge_map_sync
from paprscm.results import record
from paprscm.results.observations import Observations
from paprscm.vm.argv import bare_argv, script
from paprscm.vm.backing_files import BackingFiles, ScratchFiles
from paprscm.vm.machine import Board, Machine, Nvdimm, board_of, require
from paprscm.vm.sync_shim import Shim, build
from paprscm.vm.vm import Vm


def _with_guests(method: Callable[[QemuTest], None]) -> Callable[[QemuTest], None]:
    @functools.wraps(method)
    def wrapped(self: QemuTest) -> None:
        with self.verdict(), self.leave:
            method(self)
        if self.warnings:
            # Not log.warning(), which also ends as WARN, but without the reason.
            raise TestWarn("; ".join(self.warnings))

    return wrapped


def _final_error(error: Exception, differences: Sequence[Difference]) -> Exception:
    """The final exception of a test: its own, and the differences that it had collected.

    It keeps the class, and so the status, with one exception: a missing capability does not turn
    differences into a CANCEL.
    """
    if type(error) is AssertionError:
        # Avocado would report FAIL, but an `assert` checks our own code.
        *_, frame = traceback.extract_tb(error.__traceback__)
        error = HostError(
            f"an assertion of the test's own code failed, {Path(frame.filename).name}, line "
            f"{frame.lineno}: {frame.line}: {error}",
            hint="a test reports a broken contract with self.check() or ContractError",
        )
    lacks = isinstance(error, CapabilityError)
    if not differences:
        return TestCancel(str(error)) if lacks else error
    both = f"{error}\nbefore that, {describe(differences)}"
    if isinstance(error, Error) and not lacks:
        error.message, error.hint = both, None
        return error
    if isinstance(error, (AssertionError, CapabilityError, TestCancel)):
        return ContractError(both)
    return HostError(f"{type(error).__name__}: {both}")


class QemuTest(Test):
    """Base of tests that judge QEMU alone, without kernel and userland.

    A difference (`check`, `expect`) or a ContractError is a FAIL, a missing capability
    (`require_…`, CapabilityError) a CANCEL, every other exception, also of an `assert`, an ERROR.
    """

    # For unittest's own assert methods.
    failureException = ContractError

    # A test takes seconds. Only this limit detects a killed test process: Avocado's runner waits
    # for ever.
    timeout = 300

    def __init_subclass__(cls) -> None:
        """Wrap each test, so that ending and judging its guests is part of the test.

        Avocado reports an exception of tearDown as ERROR, which hides the test's own failure.
        """
        super().__init_subclass__()
        for name, method in list(vars(cls).items()):
            if name.startswith("test") and callable(method):
                setattr(cls, name, _with_guests(method))

    def setUp(self) -> None:
        """Read the settings, and find or prepare QEMU, kernel and userland."""
        self.leave = contextlib.ExitStack()
        """Closed at the end of the test."""
        self.warnings: list[str] = []
        """Reasons to end as WARN."""
        self.differences: list[Difference] = []
        """Differences collected by `check`, raised at the end of the test."""
        timesheet.restart()
        self._started = 0
        self.observations = Observations()
        """What the record keeps, beside status and times."""
        with self.verdict():
            parameters = {name: self.params.get(name) for name in settings.names()}
            # Values of a varianter may have other types than str.
            texts = {name: str(value) for name, value in parameters.items() if value is not None}
            self.settings = settings.load(texts)
            with timesheet.during("set-up"):
                self.qemu = self.find_qemu()

    def find_qemu(self) -> Qemu:
        """The QEMU under test."""
        qemu = binary.resolve(Archive.of(self.settings), self.settings.qemu)
        cache = Cache(self.settings.cache_dir)
        self.observations.environment = record.Environment(
            qemu=binary.recorded(cache, qemu, self.settings.qemu),
            settings=settings.changed(self.settings),
        )
        return qemu

    def tearDown(self) -> None:
        """End the processes of a timed-out test, whose thread still runs."""
        with contextlib.suppress(ContractError):
            self.leave.close()
        sheet = timesheet.record()
        self.observations.activities = sheet["seconds"]
        self.observations.counts = sheet["counts"]
        self.observations.cpu_s = sheet["cpu_s"]
        self.whiteboard = self.observations.as_json()

    def folder(self, name: str) -> Path:
        """The folder for the files of the next QEMU: data/guest, then data/guest2, …"""
        self._started += 1
        return Path(self.outputdir) / (name if self._started == 1 else f"{name}{self._started}")

    @property
    def board(self) -> Board:
        """The board of the settings, for machines without Linux: always TCG and VOF."""
        board = board_of(replace(self.settings, accel="tcg"), self.qemu)
        return replace(board, firmware="vof", cpu=Board().cpu if board.cpu == "host" else board.cpu)

    @timesheet.during("starts")
    def vm(self, machine: Machine | None = None) -> Vm:
        """A machine with its DIMMs, stopped before its first instruction.

        Args:
            machine: its slots, DIMMs and memory; None: no DIMM, and 256 MiB.
        """
        machine = machine or Machine(memory_mib=256)
        self.require_qemu(*machine.nvdimms)
        files = self.leave.enter_context(ScratchFiles(self.settings.scratch_dir, machine.nvdimms))
        board = machine.board(self.board)
        argv = bare_argv(self.qemu.argv_prefix, machine, board, files.paths)
        by_hand = script([*argv, "-monitor", "stdio"], machine.nvdimms, files.paths)
        vm = Vm(argv, files, folder=self.folder("qemu"), by_hand=by_hand)
        return self.leave.enter_context(vm)

    @timesheet.during("starts")
    def bare(
        self,
        machine: Machine,
        *,
        shim: Shim | None = None,
        source: BareMachine | None = None,
        shares_memory: bool = True,
        incoming: Sequence[str] = ("defer",),
        qemu: Qemu | None = None,
    ) -> BareMachine:
        """A machine that makes hypervisor calls; it ends with the test.

        Args:
            machine: its DIMMs, processors and memory (256 MiB or more).
            shim: loaded into its QEMU, to trace, delay and fail the syncs of backing files.
            source, shares_memory, incoming: as for BareMachine: it waits for the state of `source`.
            qemu: its QEMU; None: the one under test.
        """
        qemu = qemu or self.qemu
        self.require_qemu(*machine.nvdimms, qemu=qemu)
        return self.leave.enter_context(
            BareMachine(
                qemu,
                compile_program(Cache(self.settings.cache_dir)),
                machine,
                folder=self.folder("qemu"),
                scratch_dir=self.settings.scratch_dir,
                board=self.board,
                shim=shim,
                source=source,
                shares_memory=shares_memory,
                incoming=incoming,
            )
        )

    def keep(self, *nvdimms: Nvdimm) -> BackingFiles:
        """Backing files for DIMMs that several guests use, one after the other."""
        return self.leave.enter_context(BackingFiles(self.settings.scratch_dir, nvdimms))

    def shim(self, qemu: Qemu | None = None, *, log: Path | None = None) -> Shim:
        """A flush shim for one QEMU of this test (`log` as for Shim); CANCEL if it cannot load."""
        before = sanitizers((qemu or self.qemu).path)
        library = build(Cache(self.settings.cache_dir))
        return self.leave.enter_context(Shim(library, before=before, log=log))

    def check(self, what: str, found: object, expected: object, *, detail: str = "") -> bool:
        """Compare and continue: the end of the test reports all differences together (FAIL).

        Args:
            what: the name of the value, for a report.
            found: the value.
            expected: the contract's value, or a comparison of paprscm.checks, or a tuple of them.
            detail: the observation behind the value, for a report.

        Returns:
            Whether the values are equal.
        """
        if not differ(found, expected):
            return True
        difference = Difference(what, found, expected, detail)
        self.differences.append(difference)
        # Logged at once, in case the test is interrupted.
        self.log.info("difference: %s", difference)
        return False

    def expect(self, what: str, found: object, expected: object) -> None:
        """Compare, as `check`, but end the test at a difference: the rest depends on this value."""
        if not self.check(what, found, expected):
            self.checkpoint()

    def checkpoint(self) -> None:
        """End the test (FAIL) if `check` has collected differences: the rest depends on them."""
        if self.differences:
            differences, self.differences = self.differences, []
            raise ContractError(describe(differences))

    def require_qemu(self, *nvdimms: Nvdimm, qemu: Qemu | None = None) -> None:
        """CANCEL the test unless a QEMU, by default the one under test, supports these DIMMs."""
        for nvdimm in nvdimms:
            require(qemu or self.qemu, nvdimm)

    def possible(self, nvdimms: Iterable[Nvdimm]) -> tuple[Nvdimm, ...]:
        """The DIMMs that this QEMU supports; the number of the others is recorded."""
        requested = tuple(nvdimms)
        able = tuple(n for n in requested if self.qemu.has_pmem or not (n.pmem or n.pmem_override))
        self.measure("DIMMs left out for want of libpmem", len(requested) - len(able))
        return able

    def random(self) -> random.Random:
        """A random number generator; its seed is logged and can be set with -p seed=N."""
        seed = int(self.params.get("seed", default=random.getrandbits(32)))
        self.log.info("seed of random numbers: -p seed=%d", seed)
        self.measure("seed", seed)
        return random.Random(seed)  # noqa: S311

    def metric(self, name: str, value: float, unit: str, **dimensions: object) -> None:
        """Record a measured number, for comparison with other runs.

        Args:
            name: the same in all runs; two calls with equal names and dimensions are repetitions.
            value: finite.
            unit: as for record.Metric.
            dimensions: what distinguishes it from other metrics of this name, such as fstype="xfs".
        """
        texts = {key: str(text) for key, text in dimensions.items()}
        self.observations.metrics.append(
            record.Metric(name=name, value=float(value), unit=unit, dimensions=texts)
        )

    def measure(self, name: str, value: Any) -> None:
        """Record a fact other than a metric: a list, a text, a table; as JSON."""
        self.observations.facts[name] = value

    def versions(self) -> dict[str, str]:
        """The version of each product under test, for known issues."""
        return {"QEMU": ".".join(map(str, self.qemu.version))}

    def known_issue(self, issue: str, *, shows: bool, found: str) -> None:
        """Report that a known issue shows, or that the test looked for it and it does not show.

        The file of the issue lists the versions. In a version listed as fixed, an issue that shows
        is a regression (FAIL); else the test ends as WARN. If the issue does not show in a version
        without a listed fix, or shows before its 'Since', the end of the job asks for an update of
        its file.

        Args:
            issue: the name of its file in known_issues/, without the suffix.
            shows: this QEMU or kernel has the bug.
            found: the observation, in one sentence.

        Raises:
            ContractError: it shows, and is listed as fixed.
        """
        bug = read_issue(issue)
        number = self.versions()[bug.product]
        version = f"{bug.product} {number}"
        self.observations.known_issues.append(
            record.Finding(
                name=issue,
                title=bug.title,
                product=bug.product,
                version=number,
                shows=shows,
                found=found,
                update=bug.update(number, shows=shows),
            )
        )
        self.log.info("known issue %s %s: %s", issue, "shows" if shows else "does not show", found)
        if not shows:
            return
        if bug.state(number) is IssueState.FIXED:
            fixed_in = ", ".join(map(str, bug.fixed_in))
            file = f"known_issues/{issue}.md"
            raise ContractError(
                f"{found}: {bug.title}",
                hint=f"a regression on {version}: {file} lists it as fixed in {fixed_in}",
            )
        self.warnings.append(f"known issue {issue}: {found}")

    def remark(self, found: str) -> None:
        """End the test as WARN, for a change that does not break the contract."""
        self.log.info("%s", found)
        self.warnings.append(found)

    def usual(self, what: str, found: object, usual: object) -> None:
        """End the test as WARN if a value that no contract fixes differs from earlier versions.

        Args:
            what: the name of a text, a count or a state of QEMU or Linux.
            found: its value.
            usual: its value on those versions.
        """
        if found != usual:
            self.remark(f"{what}: {found!r}, in earlier versions {usual!r}")

    @contextlib.contextmanager
    def verdict(self) -> Iterator[None]:
        """Convert exceptions into the test's verdict, and raise the differences of `check`."""
        try:
            yield
        except Exception as error:
            end = _final_error(error, self.differences)
            # Avocado passes on one text; a TestCancel has the text of the CapabilityError.
            source = error if isinstance(end, TestCancel) else end
            if isinstance(source, Error):
                self.observations.reason, self.observations.hint = source.message, source.hint or ""
            if end is error:
                raise
            raise end from error
        self.checkpoint()


class PaprScmTest(QemuTest):
    """Base of tests with guests, which end with the test; their logs are kept."""

    environment: Environment

    def find_qemu(self) -> Qemu:
        """Prepare everything that guests need; return the QEMU under test."""
        self.environment = prepare(self.settings)
        self.observations.environment = self.environment.recorded()
        return self.environment.qemu

    def versions(self) -> dict[str, str]:
        """The versions of QEMU and of the guest's kernel."""
        return {**super().versions(), "Linux": self.environment.kernel.release}

    def require_cpus(self, count: int) -> None:
        """CANCEL the test unless guests have at least `count` vCPUs."""
        smp = self.settings.smp
        if smp < count:
            raise CapabilityError(f"the test needs {count} vCPUs, not {smp}", hint=f"smp={count}")

    def require_kernel(self, *options: str, hint: str | None = None) -> None:
        """CANCEL the test unless the guest's kernel was built with each option.

        Args:
            options: such as "CONFIG_KPROBES"; a kernel of unknown configuration lacks them all.
            hint: a kernel with it, if that of `paprscm kernel build` lacks it.
        """
        for option in options:
            self.environment.kernel.require_option(option.removeprefix("CONFIG_"), hint=hint)

    def check_map_sync(
        self, what: str, report: MapSyncReport, expected: Verdict, *, fstype: str | None = None
    ) -> None:
        """Compare the verdict of a probe.

        Args:
            what: the name of the file, for a report.
            report: of the probe.
            expected: the contract's verdict.
            fstype: the file system that must hold the file. Below a mount point without a mount,
                every file would be "not DAX".
        """
        judgement = judge_map_sync(report)
        fs_name = report.file.fs_name if report.file else None
        if fstype is not None and fs_name != fstype:
            self.check(f"{what}: file system of {report.path}", fs_name, fstype)
        self.check(what, judgement.verdict.value, expected.value, detail=judgement.reason)

    @timesheet.during("starts")
    def boot(
        self,
        machine: Machine | None = None,
        *,
        cold: bool = False,
        allowed: Iterable[str] = (),
        shim: Shim | None = None,
        during_boot: Callable[[Guest], object] | None = None,
    ) -> Guest:
        """Start a guest with its DIMMs; it ends with the test.

        It is booted, or restored from a snapshot with the DIMMs plugged before it runs.

        Args:
            machine: its DIMMs and words for the kernel; None: no DIMM.
            cold: boot it; the DIMMs are present when its kernel starts.
            allowed: kernel messages that the test expects (regular expressions).
            shim: loaded into its QEMU, to trace, delay and fail the syncs of backing files.
            during_boot: as for Guest; the guest is booted.
        """
        machine = machine or Machine()
        self.require_qemu(*machine.nvdimms)
        folder = self.folder("guest")
        start = self.environment.guest(
            machine,
            folder=folder,
            cold=cold,
            allowed=allowed,
            shim=shim,
            during_boot=during_boot,
        )
        guest = self.leave.enter_context(start)
        for mark, since_exec_s in guest.times.reached().items():
            self.metric("guest_start", since_exec_s, "s", guest=folder.name, mark=mark)
        return guest
