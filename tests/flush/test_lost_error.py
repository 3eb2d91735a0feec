# SPDX-License-Identifier: GPL-2.0-or-later
"""A bio with a flush before and a flush after its data, of which only the first fails.

File systems write their journals with REQ_PREFLUSH | REQ_FUA: file data must be durable before the
record that refers to them. If the first flush fails, the bio must fail
(Documentation/block/writeback_cache_control.rst). Otherwise fsync(2) returns 0 for data that the
host has lost: the host reports a failed write-back once, and its next fdatasync succeeds.
"""

from __future__ import annotations

import errno

from paprscm.errors import ContractError, HostError
from paprscm.flush.accounts import FlushAccounts
from paprscm.pmem.mounts import FsType, dax_mount
from paprscm.testcase import PaprScmTest
from paprscm.vm.dimms import FOR_XFS, PMEM_OFF
from paprscm.vm.machine import Machine

SLOT = 1
MESSAGES = (
    r"papr_scm .*: flush error: -1$",
    # The messages of a file system that has noticed the error.
    r"I/O error",
    r"log I/O error|Log I/O Error|metadata I/O error|Filesystem has been shut down",
    r"EXT4-fs error|EXT4-fs .*: Remounting filesystem read-only|JBD2: Error|Aborting journal",
)


class LostError(PaprScmTest):
    """
    The first of two flushes of one bio.

    :avocado: tags=flush
    """

    def judge(self, fstype: FsType) -> None:
        """Let only the first flush fail; fsync must fail with EIO."""
        nvdimm = PMEM_OFF.at(SLOT, FOR_XFS).holding(fstype)
        guest = self.boot(Machine(nvdimms=(nvdimm,)), allowed=MESSAGES, shim=self.shim())
        # No periodic log write happens meanwhile.
        options = "dax=always" + (",commit=600" if fstype == "ext4" else "")
        dax_mount(guest, SLOT, fstype, "/mnt/a", options=options)
        accounts = FlushAccounts(guest, [SLOT])
        command = "xfs_io -f -c 'pwrite -q 0 64k' -c fsync /mnt/a/file"
        guest.succeed(f"{command} && sync")
        syncs = guest.vm.syncs(SLOT)
        # The control: the changed time stamp makes fsync write the journal, by one such bio.
        # Time stamps have the resolution of the kernel's tick, 10 ms or less.
        guest.succeed(f"sleep 0.1; {command}")
        if (count := accounts.take().count) < 2:
            raise HostError(f"{count} flushes: no bio had two flushes")
        syncs.fail(errno.EIO, nth=1)
        result = guest.run(f"sleep 0.1; {command}")  # As above.
        syncs.clear()
        flushes = accounts.take().flushes[SLOT]
        codes = [flush.code for flush in flushes]
        self.measure("codes", codes)
        if syncs.counts().failed != 1 or not codes or codes[0] == 0:
            raise HostError(f"the first flush did not fail: {codes}")
        if result.status and "Input/output error" not in result.stderr:
            raise ContractError(f"fsync fails, but not with EIO: {result}")
        self.known_issue(
            "linux-pmem-loses-preflush-error",
            shows=result.status == 0,
            found=f"{fstype}: fsync returns {0 if not result.status else 'EIO'} after flushes that "
            f"ended with {codes}",
        )

    def test_xfs(self) -> None:
        """On XFS, fsync fails with EIO when the flush before the log record fails."""
        self.judge("xfs")

    def test_ext4(self) -> None:
        """On ext4, fsync fails with EIO when the flush before the commit record fails."""
        self.judge("ext4")
