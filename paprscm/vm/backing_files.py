# SPDX-License-Identifier: GPL-2.0-or-later
"""Backing files of DIMMs."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

from paprscm.errors import HostError
from paprscm.vm.machine import Nvdimm


class BackingFiles:
    """Files behind DIMMs that outlive the guests which use them, one after the other.

    They have no name: whatever becomes of this process, nothing is left behind.

    Args:
        folder: where they take space, sparse.
        nvdimms: the DIMMs, by slot; their own `file` does not count.
    """

    def __init__(self, folder: Path, nvdimms: Iterable[Nvdimm]) -> None:
        self._stack = contextlib.ExitStack()
        self._nvdimms = {nvdimm.slot: nvdimm for nvdimm in nvdimms}
        self._handles: dict[int, int] = {}
        try:
            for slot in self._nvdimms:
                handle, name = tempfile.mkstemp(prefix="paprscm-", dir=folder)
                self._stack.callback(os.close, handle)
                Path(name).unlink()
                os.truncate(handle, self._nvdimms[slot].file_bytes)
                self._handles[slot] = handle
        except OSError as error:
            self._stack.close()
            raise HostError(
                f"no backing files in {folder}: {error.strerror}", hint="set scratch_dir"
            ) from error

    def __enter__(self) -> Self:
        """Nothing more."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def path(self, slot: int) -> Path:
        """Where others find the file for as long as this process has it."""
        return Path(f"/proc/{os.getpid()}/fd/{self._handles[slot]}")

    def nvdimms(self) -> tuple[Nvdimm, ...]:
        """The DIMMs, for the next guest."""
        return tuple(
            dataclasses.replace(nvdimm, file=self.path(slot))
            for slot, nvdimm in self._nvdimms.items()
        )
