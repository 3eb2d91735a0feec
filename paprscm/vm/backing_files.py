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
    """Backing files of DIMMs that several guests use, one after the other.

    They have no name in a folder, so nothing is left when this process ends, however it ends.

    Args:
        folder: for the sparse files.
        nvdimms: the DIMMs; their own `file` is ignored.
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
        """The file's path for QEMU, valid until these files are closed."""
        return Path(f"/proc/{os.getpid()}/fd/{self._handles[slot]}")

    def nvdimms(self) -> tuple[Nvdimm, ...]:
        """The DIMMs, for the next guest."""
        return tuple(
            dataclasses.replace(nvdimm, file=self.path(slot))
            for slot, nvdimm in self._nvdimms.items()
        )
