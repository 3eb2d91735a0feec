# SPDX-License-Identifier: GPL-2.0-or-later
"""Each sleep of the suite has a comment with its reason; docs/speed.md lists the long ones."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from paprscm.paths import ROOT

FOLDERS = ("paprscm", "tests")
# `sleep 5` and `sleep $n` of a shell, also in an f-string.
SHELL = re.compile(r"\bsleep ([\d$]|\{|\d)")
COMMENT = re.compile(r"(^|\s)#\s*(?!noqa|type:|SPDX)\w")
# Polls the memory of a machine, as its docstring says.
DOCUMENTED = {"paprscm/hcall/bare_metal.py:_wait"}


def sleeps(tree: ast.AST, lines: list[str], name: str = "") -> Iterator[tuple[int, str]]:
    """Line number and enclosing function of each sleep: a call, or a word of a shell command."""
    for node in ast.iter_child_nodes(tree):
        inside = node.name if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) else name
        match node:
            case ast.Call(func=ast.Attribute(attr="sleep" | "pause") | ast.Name(id="sleep")):
                yield node.lineno, name
            case ast.Expr(value=ast.Constant()):
                continue  # A docstring.
            case ast.Constant(value=str()) | ast.JoinedStr():
                for number in range(node.lineno, (node.end_lineno or node.lineno) + 1):
                    if SHELL.search(lines[number - 1]):
                        yield number, name
                continue
        yield from sleeps(node, lines, inside)


def without_reason(source: str) -> list[tuple[int, str]]:
    """The sleeps without a comment on their line or on the one before it."""
    lines = source.splitlines()
    return [
        (number, name)
        for number, name in sorted(set(sleeps(ast.parse(source), lines)))
        if not any(COMMENT.search(line) for line in lines[max(0, number - 2) : number])
    ]


def test_each_sleep_has_its_reason() -> None:
    files = [file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*.py"))]
    bare = [
        f"{path}:{number}"
        for path, file in ((str(file.relative_to(ROOT)), file) for file in files)
        for number, name in without_reason(file.read_text())
        if f"{path}:{name}" not in DOCUMENTED
    ]
    assert bare == []


@pytest.mark.parametrize(
    "line",
    [
        "time.sleep(0.1)",
        "timesheet.pause(0.1)",
        "await asyncio.sleep(delay)",
        "sleep(1)",
        "guest.succeed('true; sleep 5')",
        "guest.succeed(f'sleep {delay_s}; dmesg')",
        "guest.succeed('sleep $1')",
        "guest.succeed('''true\nsleep 1\n''')",
        "time.sleep(0.1)  # noqa: S101",
    ],
)
def test_a_sleep_is_found_unless_it_has_a_comment(line: str) -> None:
    source = f"async def poll():\n    {line}\n"
    assert [name for _number, name in without_reason(source)] == ["poll"]
    first, _, rest = source.partition("\n")
    assert without_reason(f"{first}\n    # The kernel's timer.\n{rest}") == [] or "\n" in line
    assert without_reason(source.replace("\nsleep 1", "\n# The timer.\nsleep 1")) == [] or (
        "\n" not in line
    )


def test_other_words_are_no_sleep() -> None:
    assert (
        without_reason('def f():\n    """Print "sleep 5"."""\n    x = "longest sleep of 1 s"\n')
        == []
    )
