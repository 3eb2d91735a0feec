#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# Run a test that kills its own process.
. "$(dirname "$0")/../lib.sh"

expected "a job ends if the process of its test is killed"
cat > killed.py << 'END'
import os
import signal
from pathlib import Path

from avocado import Test


class Killed(Test):
    timeout = 5

    def test(self):
        Path(os.environ["STARTED"]).touch()
        os.kill(os.getpid(), signal.SIGKILL)
END
STARTED=$PWD/started timeout 60 "${PYTHON:-python3}" -m avocado run --job-results-dir results killed.py > output 2>&1
status=$?
[ -e started ] || unknown "the test did not start: $(tail -n 1 output)"
[ $status -ne 124 ] || shown "the job still runs 60 s after the test's process was killed"
gone "the job ends: $(grep RESULTS output)"
