# SPDX-License-Identifier: GPL-2.0-or-later
"""Random sequences of hcalls with migrations between them."""

from paprscm.hcall.bare_metal import BareMachine
from paprscm.hcall.judge import ScmJudge
from paprscm.hcall.sequences import DIMMS
from paprscm.migration.histories import MigratingRunner, histories
from paprscm.testcase import QemuTest
from paprscm.vm.machine import Machine


class Histories(QemuTest):
    """
    :avocado: tags=hcall,flush,migration,stateful
    """

    timeout = 900

    def test_random_histories(self) -> None:
        """For any sequence of calls and migrations, all answers together are those of one machine.

        A flush that was pending is synced again by the destination, once, and its token is
        long-busy until that sync has ended.
        """
        count = int(self.params.get("sequences", default=30))
        dimms = self.keep(*self.possible(DIMMS)).nvdimms()
        machine = Machine(nvdimms=dimms, smp=1, memory_mib=256)

        def start() -> ScmJudge:
            return ScmJudge(self.bare(machine, shim=self.shim()), dimms)

        def follow(source: BareMachine) -> BareMachine:
            return self.bare(machine, shim=self.shim(), source=source)

        runner = MigratingRunner(start, follow)
        first = self.random().getrandbits(64)
        try:
            runner.run_all(histories, count=count, first=first, folder=self.workdir)
        finally:
            for name in ("sequences", "hcalls", "migrations", "pending", "completed"):
                unit = "flushes" if name in ("pending", "completed") else name
                self.metric(name, getattr(runner, name), unit)
                self.log.info("%s: %d", name, getattr(runner, name))
