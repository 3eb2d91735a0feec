# SPDX-License-Identifier: GPL-2.0-or-later
"""Fixtures of selftests with a real QEMU or guest."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from paprscm import settings
from paprscm.debian.packages import Archive
from paprscm.emulator.binary import Qemu, resolve
from paprscm.guest.environment import Environment, prepare
from paprscm.guest.guest import Guest
from paprscm.paths import ROOT
from paprscm.vm.machine import Machine


@pytest.fixture(scope="session")
def environment() -> Environment:
    """QEMU, kernel and userland of ./avocado.cfg; missing ones are built."""
    return prepare(settings.load(config=ROOT / "avocado.cfg"))


@pytest.fixture(scope="session")
def qemu() -> Qemu:
    """The QEMU of ./avocado.cfg."""
    chosen = settings.load(config=ROOT / "avocado.cfg")
    return resolve(Archive.of(chosen), chosen.qemu)


@pytest.fixture
def boot(environment: Environment, tmp_path: Path) -> Iterator[Callable[..., Guest]]:
    """Boot a guest that ends with the test; `limits` are settings, the rest is as for Guest."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    with ExitStack() as stack:

        def boot_one(
            machine: Machine | None = None,
            *,
            limits: dict[str, Any] | None = None,
            **options: object,
        ) -> Guest:
            chosen = dataclasses.replace(
                environment.settings, scratch_dir=scratch, **(limits or {})
            )
            equipment = dataclasses.replace(environment.equipment, settings=chosen)
            guest = Guest(equipment, machine or Machine(), folder=tmp_path / "guest", **options)  # type: ignore[arg-type]
            return stack.enter_context(guest)

        yield boot_one
    assert list(scratch.iterdir()) == [], "a guest left its backing files behind"
