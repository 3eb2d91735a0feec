#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# Compare the durations of a test without messages and of one with 2000.
. "$(dirname "$0")/../lib.sh"

expected "a runner reads a message when it arrives"
cat > messages.py << 'END'
from avocado import Test


class Messages(Test):
    def test_0(self):
        pass

    def test_2000(self):
        for number in range(2000):
            self.log.info("message %d", number)
END
# seconds TEST: duration of a job with one test.
seconds() {
	start=$(date +%s)
	"${PYTHON:-python3}" -m avocado run --job-results-dir results "messages.py:Messages.$1" > output 2>&1 ||
		unknown "avocado run: $(tail -n 1 output)"
	echo $(($(date +%s) - start))
}
without=$(seconds test_0) && with=$(seconds test_2000) || unknown "$without$with"
text="a test with 2000 messages takes $((with - without)) s more than one without"
[ $((with - without)) -lt 10 ] || shown "$text"
[ $((with - without)) -ge 5 ] || gone "$text"
unknown "$text"
