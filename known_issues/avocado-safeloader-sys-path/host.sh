#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# Look for the tests in a file whose class has its base class in another folder.
. "$(dirname "$0")/../lib.sh"

expected "looking for tests does not change sys.path"
mkdir library
touch library/__init__.py
printf 'from avocado import Test\n\n\nclass Base(Test):\n    pass\n' > library/base.py
printf 'from library.base import Base\n\n\nclass A(Base):\n    def test(self):\n        pass\n' > test_a.py
cat > look.py << 'END'
import sys

from avocado.core.safeloader import find_avocado_tests

before = list(sys.path)
if not find_avocado_tests("test_a.py")[0]:
    sys.exit("no test in test_a.py")
print(*(folder for folder in sys.path if folder not in before))
END
text=$(PYTHONPATH=. "${PYTHON:-python3}" look.py 2>&1) || unknown "$text"
[ -z "$text" ] || shown "sys.path has $text in addition"
gone "sys.path is the same"
