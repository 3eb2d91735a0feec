# SPDX-License-Identifier: GPL-2.0-or-later
"""Random sequences of hcalls on several DIMMs, compared with the model call by call."""

from paprscm.hcall.judge import ScmJudge, counts_by_name
from paprscm.hcall.sequences import DIMMS, SequenceRunner, sequences_of, steps
from paprscm.testcase import QemuTest
from paprscm.vm.machine import Machine


class Model(QemuTest):
    """
    :avocado: tags=hcall,stateful
    """

    timeout = 600

    def test_random_sequences(self) -> None:
        """For any sequence of calls, the machine returns the same results as the model."""
        count = int(self.params.get("sequences", default=500))
        machine = Machine(nvdimms=self.possible(DIMMS), smp=1, memory_mib=256)

        def start() -> ScmJudge:
            return ScmJudge(self.bare(machine, shim=self.shim()), machine.nvdimms)

        runner = SequenceRunner(start)
        first = self.random().getrandbits(64)
        try:
            runner.run_all(sequences_of(steps), count=count, first=first, folder=self.workdir)
        finally:
            self.metric("sequences", runner.sequences, "sequences")
            self.metric("hcalls", runner.hcalls, "hcalls")
            self.measure("branches", counts_by_name(runner.judge.model.covered))
        self.log.info("%d hcalls in %d sequences", runner.hcalls, runner.sequences)
