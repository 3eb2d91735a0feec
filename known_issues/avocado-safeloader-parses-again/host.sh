#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# Count how often the file of a base class is parsed for five classes.
. "$(dirname "$0")/../lib.sh"

expected "the file of the base class is parsed once"
mkdir library
touch library/__init__.py
printf 'from avocado import Test\n\n\nclass Base(Test):\n    pass\n' > library/base.py
echo 'from library.base import Base' > test_a.py
for name in A B C D E; do
	printf '\n\nclass %s(Base):\n    def test(self):\n        pass\n' $name >> test_a.py
done
cat > look.py << 'END'
import ast
import sys

from avocado.core.safeloader import find_avocado_tests

paths = []
parse = ast.parse


def counting_parse(source, path="?", *words, **options):
    paths.append(str(path))
    return parse(source, path, *words, **options)


ast.parse = counting_parse
if len(find_avocado_tests("test_a.py")[0]) != 5:
    sys.exit("not five classes in test_a.py")
print(sum(path.endswith("library/base.py") for path in paths))
END
number=$(PYTHONPATH=. "${PYTHON:-python3}" look.py 2>&1) || unknown "$number"
case $number in
1) gone "library/base.py was parsed once" ;;
[2-9] | [1-9][0-9]*) shown "library/base.py was parsed $number times" ;;
*) unknown "$number" ;;
esac
