# SPDX-License-Identifier: GPL-2.0-or-later
"""`PaprScmTest`: what a test of this suite is, as Avocado sees it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from avocado import Test

from paprscm import settings
from paprscm.environment import Environment, prepare
from paprscm.errors import CapabilityError, ContractError
from paprscm.guest import Guest
from paprscm.machine import Machine, Nvdimm


def _with_guests(method: Callable[[PaprScmTest], None]) -> Callable[[PaprScmTest], None]:
    @functools.wraps(method)
    def wrapped(self: PaprScmTest) -> None:
        with self.verdict(), self.leave:
            method(self)

    return wrapped


class PaprScmTest(Test):
    """Base of all tests: boots guests, ends them with the test, and keeps what they left.

    A broken contract (ContractError, AssertionError) is a FAIL, a missing capability a CANCEL,
    every other exception an ERROR.
    """

    # A test takes seconds. The limit is there for what nothing else notices: Avocado's runner
    # waits for ever for a test process that was killed.
    timeout = 300

    def __init_subclass__(cls) -> None:
        """Wrap each test, so that its guests end, and are judged, as a part of it.

        What tearDown raises is an ERROR for Avocado, and hides what the test itself had found.
        """
        super().__init_subclass__()
        for name, method in list(vars(cls).items()):
            if name.startswith("test") and callable(method):
                setattr(cls, name, _with_guests(method))

    def setUp(self) -> None:
        """Read the settings and make sure that all that guests need is there."""
        self.leave = contextlib.ExitStack()
        """Ends the guests when the test has ended."""
        self._guests = 0
        self._metrics: dict[str, Any] = {}
        with self.verdict():
            given = {name: self.params.get(name) for name in settings.names()}
            # A varianter's values need not be strings.
            words = {name: str(value) for name, value in given.items() if value is not None}
            self.settings = settings.load(words)
            self.environment: Environment = prepare(self.settings)
        self.measure("environment", self.environment.describe())

    def tearDown(self) -> None:
        """End what a timed-out test, which goes on beside this, has left running."""
        with contextlib.suppress(ContractError):
            self.leave.close()
        self.whiteboard = json.dumps(self._metrics, indent=1, sort_keys=True)

    def boot(self, machine: Machine | None = None, *, allowed: Iterable[str] = ()) -> Guest:
        """A running guest; it ends with the test.

        Args:
            machine: what is wanted; memory, CPU, firmware and accelerator come from the settings.
            allowed: kernel messages that the test expects (regular expressions).
        """
        wanted = self.environment.furnish(machine or Machine())
        self.require(wanted.nvdimms)
        self._guests += 1
        name = "guest" if self._guests == 1 else f"guest{self._guests}"
        folder = Path(self.outputdir) / name
        guest = Guest(self.environment.equipment, wanted, folder=folder, allowed=allowed)
        self.leave.enter_context(guest)
        self.measure(f"{name}.boot_s", dataclasses.asdict(guest.times))
        return guest

    def require(self, nvdimms: Iterable[Nvdimm]) -> None:
        """CANCEL the test unless the QEMU under test has what these DIMMs need."""
        for nvdimm in nvdimms:
            self.environment.require(nvdimm)

    def measure(self, name: str, value: Any) -> None:
        """Keep a figure or a fact in the test's whiteboard, as JSON."""
        self._metrics[name] = value

    @contextlib.contextmanager
    def verdict(self) -> Iterator[None]:
        """Within, what the QEMU, kernel or host cannot do makes the test CANCEL."""
        try:
            yield
        except CapabilityError as error:
            self.cancel(str(error))
