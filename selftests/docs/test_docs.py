# SPDX-License-Identifier: GPL-2.0-or-later
"""Links, paths, commands, test ids and messages in the documents; generated files are current."""

from __future__ import annotations

import ast
import contextlib
import fnmatch
import functools
import io
import itertools
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

from paprscm import settings
from paprscm.commands import cli
from paprscm.paths import ROOT

DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "known_issues").glob("*.md")),
]
BIN = Path(sys.executable).parent
FOLDERS = "paprscm tests selftests guest_tools host_tools images known_issues docs tools .github"
PATH = re.compile(rf"(?:{FOLDERS.replace(' ', '|')})/[\w./*-]+")
TEST_ID = re.compile(r"(?:tests/)?(\w+/test_\w+\.py:\w+(?:\.[\w*]+)?)")
TUTORIAL_TEST = "tests/flush/test_fsync.py"
each_document = pytest.mark.parametrize(
    "document", DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT))
)


def tokens(document: Path) -> Iterator[Token]:
    """All tokens of a document, with inline tokens."""
    for token in MarkdownIt().enable("table").parse(document.read_text()):
        yield token
        yield from token.children or ()


def anchors(document: Path) -> set[str]:
    """The anchors that GitHub and GitLab make of the headings."""
    parsed = MarkdownIt().parse(document.read_text())
    titles = [b.content for a, b in itertools.pairwise(parsed) if a.type == "heading_open"]
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@each_document
def test_links_lead_to_a_file_and_a_heading(document: Path) -> None:
    wrong = []
    for token in tokens(document):
        target = str(token.attrGet("href") or token.attrGet("src") or "")
        if not target or re.match("[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (document.parent / path) if path else document
        if not file.exists() or (anchor and anchor not in anchors(file)):
            wrong.append(target)
    assert wrong == []


@each_document
def test_paths_exist(document: Path) -> None:
    """Inline code that begins with a folder of the project exists."""
    words = [w for t in tokens(document) if t.type == "code_inline" for w in t.content.split()]
    paths = [match[0] for word in words if (match := PATH.match(word))]
    missing = [p for p in paths if not any(ROOT.glob(p.rstrip("./"))) and p != TUTORIAL_TEST]
    assert missing == []


@functools.cache
def listed() -> dict[str, set[str]]:
    """Id and tags of each test, from `avocado list`."""
    table = subprocess.run(
        [BIN / "avocado", "-V", "list", "tests/"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    rows = [line.split() for line in table.splitlines() if line.startswith("avocado-instrumented ")]
    return {row[1]: set(row[4].split(",")) for row in rows if len(row) == 5}


@each_document
def test_test_ids_exist(document: Path) -> None:
    """Ids with or without tests/; a class without a test, and * for several tests."""
    known = [id_.removeprefix("tests/") for id_ in listed()]
    wrong = [
        name
        for name in TEST_ID.findall(document.read_text())
        if f"tests/{name}".partition(":")[0] != TUTORIAL_TEST
        and not fnmatch.filter(known, name if "." in name.partition(":")[2] else f"{name}.*")
    ]
    assert wrong == []


def command_lines(document: Path) -> set[str]:
    """Lines of code blocks, and inline code, that begin with a command of the project."""
    lines: list[str] = []
    for token in tokens(document):
        if token.type in ("fence", "code_block"):
            lines += token.content.splitlines()
        elif token.type == "code_inline":
            lines.append(token.content)
    lines_found = set()
    for line in lines:
        words = line.strip().removeprefix("$ ")
        inner = re.findall(r"\$\((.*?)\)|<\((.*?)\)", words)
        for text in [words, *("".join(pair) for pair in inner)]:
            if re.match(r"(paprscm|avocado (run|list)|make) \S", text):
                lines_found.add(re.sub(r'"\$\(.*?\)"|…', "X", text).partition("  #")[0].rstrip())
    return lines_found


COMMANDS = sorted({line for document in DOCUMENTS for line in command_lines(document)})


def test_commands_are_found() -> None:
    assert len(COMMANDS) > 40


@pytest.mark.parametrize("line", [c for c in COMMANDS if c.startswith("paprscm")])
def test_paprscm_takes_the_command(line: str) -> None:
    words = shlex.split(line.partition(" > ")[0])[1:]
    words = words[: words.index("--")] if "--" in words else words
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            cli.parser().parse_args(words)
        except SystemExit as end:
            # --help, --man, --completion; or a verb without its required arguments.
            name = line.replace("-", "") == line and "required" in output.getvalue()
            assert end.code in (0, None) or name, output.getvalue()


@functools.cache
def parameters() -> set[str]:
    """Names for -p: settings, parameters of tests, and Avocado's own."""
    sources = [*(ROOT / "tests").rglob("*.py"), ROOT / "paprscm/testcase.py"]
    names = [n for f in sources for n in re.findall(r'params\.get\("(\w+)"', f.read_text())]
    return {*settings.names(), *names, "timeout"}


@functools.cache
def avocado_help(verb: str) -> str:
    """The options of `avocado VERB`."""
    argv = [str(BIN / "avocado"), verb, "--help"]
    return subprocess.run(argv, stdout=subprocess.PIPE, text=True, check=True).stdout


@pytest.mark.parametrize("line", [c for c in COMMANDS if c.startswith("avocado")])
def test_avocado_takes_the_command(line: str) -> None:
    """Options are in its help, parameters exist, and the tags select at least one test."""
    words = shlex.split(line)
    usage = avocado_help(words[1])
    rest, tags, references = iter(words[2:]), [], []
    for word in rest:
        if word == "--":
            break
        if word.startswith("-"):
            assert re.search(rf"^\s+(-\w \w+, |-\w, )?{word.partition('=')[0]}\b", usage, re.M), (
                word
            )
            value = next(rest, "") if word in ("-p", "-t") else ""
            if word == "-p":
                assert value.partition("=")[0] in parameters()
            if word == "-t":
                tags.append(set(value.split(",")))
        else:
            references.append(word)
    if TUTORIAL_TEST in references:
        return
    starts = tuple(references) or "tests/"
    chosen = [have for id_, have in listed().items() if id_.startswith(starts)]
    assert chosen, references
    assert not tags or any(needed <= have for needed in tags for have in chosen), tags


@pytest.mark.parametrize("line", [c for c in COMMANDS if c.startswith("make")])
def test_make_has_the_target(line: str) -> None:
    ours = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)
    kernels = ["modules_install", "allnoconfig", "olddefconfig", "mrproper", "modules"]
    kernels += ["bindeb-pkg", "tar-pkg"]
    assert line.split()[1].rstrip("&") in [*ours, *kernels]


@functools.cache
def messages() -> list[str]:
    """Strings of the library, with … for each formatted value."""
    strings = []
    for file in (ROOT / "paprscm").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            values = [p.value if isinstance(p, ast.Constant) else "…" for p in parts]
            if all(isinstance(value, str) for value in values):
                strings.append("".join(map(str, values)))
    return strings


def quoted() -> list[str]:
    """Messages in the first column of the table of docs/failures.md."""
    text = (ROOT / "docs/failures.md").read_text().partition("## Messages")[2]
    first = [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| `")]
    return [message for cell in first for message in re.findall("`([^`]+)`", cell)]


@pytest.mark.parametrize("message", quoted())
def test_a_message_of_the_table_is_printed_by_the_code(message: str) -> None:
    assert any(message in text for text in messages())


def test_generated_files_are_current() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "tools/docs.py", "--check"], stderr=subprocess.PIPE, text=True
    )
    assert done.stderr == ""


def test_contracts_have_every_test() -> None:
    """The generated file, made without executing the tests, has the same ids as Avocado's list."""
    rows, name, class_ = set(), "", ""
    for line in (ROOT / "docs/contracts.md").read_text().splitlines():
        if match := re.match(r"### \[(.*?)\]", line):
            name = match[1]
        elif match := re.match(r"`(\w+)`, tags", line):
            class_ = match[1]
        elif match := re.match(r"\| `(test_\w+)` \| (.+?) \|", line):
            rows.add(f"{name}:{class_}.{match[1]}")
    assert rows == set(listed())
