# SPDX-License-Identifier: GPL-2.0-or-later
"""Legal states after a power cut: compared with the host's file system, program by program."""

from __future__ import annotations

import dataclasses
import random
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from guest_tool import FOR_THE_GUEST, compile_on_host, is_ppc64le

from paprscm.guest.report import ProbeError, read_report
from paprscm.power_cut.generate import BEFORE, OPERATIONS, durable, programs
from paprscm.power_cut.programs import _RunReport, _TreeReport
from paprscm.power_cut.steps import Entry, Program, Step

SYNC = Step("syncfs", ".")


def dice() -> random.Random:
    return random.Random(1)  # noqa: S311


@pytest.fixture(scope="module")
def binary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_on_host("powercut", tmp_path_factory.mktemp("powercut") / "powercut")


class Host:
    """Makes steps on the host's file system; remembers the state after each number of steps."""

    def __init__(self, binary: Path, folder: Path) -> None:
        self._binary = binary
        self._folder = folder
        self._counter = folder.parent / "counter"
        with self._counter.open("wb") as file:
            file.truncate(2 << 20)

    def states(self, steps: Sequence[Step]) -> list[dict[str, Entry]]:
        """The files before the first step, and after each."""
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir()
        found = [self.tree()]
        for step in steps:
            self.run(step)
            found.append(self.tree())
        return found

    def run(self, *steps: Step | str, status: int = 0) -> _RunReport:
        words = [str(self._binary), "run", str(self._folder), str(self._counter)]
        words += map(str, steps)
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert done.returncode == status, done.stderr
        return read_report(_RunReport, done.stdout, done.returncode)

    def tree(self) -> dict[str, Entry]:
        words = [str(self._binary), "tree", str(self._folder)]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        report = read_report(_TreeReport, done.stdout, 0)
        return {one.path[2:]: one.entry() for one in report.entries if one.path != "."}

    def count(self) -> int:
        return int.from_bytes(self._counter.read_bytes()[:8], "little")


@pytest.fixture
def host(binary: Path, tmp_path: Path) -> Host:
    return Host(binary, tmp_path / "files")


@pytest.mark.parametrize("name", OPERATIONS)
def test_what_was_there_is_legal_and_what_was_durable_cannot_be_missing(
    host: Host, name: str
) -> None:
    operation = [
        dataclasses.replace(step, byte=7) if "write" in step.verb or step.verb == "store" else step
        for step in OPERATIONS[name]
    ]
    for way in durable(operation):
        steps = [*BEFORE, SYNC, *operation, *way]
        program = Program(steps)
        states = host.states(steps)
        first = len(BEFORE) + 1
        for done in range(first, len(steps) + 1):
            expected = program.expected(done)
            # A host that writes everything at once.
            assert expected.differences(states[done]) == [], (way, done)
            if done < len(steps):
                # The next step has begun, and perhaps its effect is on the disk.
                assert expected.differences(states[done + 1]) == [], (way, done)
        everything = way[-1].verb in ("syncfs", "sync")
        if everything:
            assert states[-1] != states[first]
            assert program.expected(len(steps)).differences(states[first]) != [], way
            # Without the last step, nothing of the operation is durable but what its own fsync and
            # O_DSYNC have made so.
        if not any(s.verb in ("fsync", "dwrite") for s in operation):
            done = first + len(operation)
            assert program.expected(done).differences(states[first]) == []


def small(*steps: Step) -> Program:
    return Program([Step("create", "a"), Step("write", "a", "", 0, 2048, 1), SYNC, *steps])


def entry(*sectors: int | None, size: int | None = None, inode: int = 1, links: int = 1) -> Entry:
    size = len(sectors) * 512 if size is None else size
    return Entry(folder=False, inode=inode, links=links, size=size, sectors=sectors)


def differences(program: Program, found: dict[str, Entry], done: int | None = None) -> list[str]:
    return program.expected(len(program.steps) if done is None else done).differences(found)


def test_a_sector_is_old_or_new() -> None:
    program = small(Step("write", "a", "", 512, 1024, 5))
    for legal in ((1, 1, 1, 1), (1, 5, 1, 1), (1, 1, 5, 1), (1, 5, 5, 1), (1, None, 5, 1)):
        assert differences(program, {"a": entry(*legal)}) == []
    for illegal, text in (
        ((5, 5, 5, 1), "a: has byte 5 in sector 0, not 1"),
        ((1, 0, 5, 1), "a: has byte 0 in sector 1, not 1 or 5"),
        ((1, 5, 5, None), "a: has several bytes in sector 3, not 1"),
        ((1, 1, 1), "a: has 1536 bytes, not 2048"),
    ):
        assert differences(program, {"a": entry(*illegal)}) == [text]
    assert differences(program, {}) == ["a: missing"]


@pytest.mark.parametrize("verb", ["fsync", "fdatasync", "syncfs", "sync"])
def test_after_a_sync_call_it_is_new(verb: str) -> None:
    program = small(Step("write", "a", "", 512, 512, 5), Step(verb, "a"))
    assert differences(program, {"a": entry(1, 5, 1, 1)}) == []
    assert differences(program, {"a": entry(1, 1, 1, 1)}) != []
    # While the call is in progress, nothing is promised.
    assert differences(program, {"a": entry(1, 1, 1, 1)}, done=4) == []


def test_o_dsync_and_msync_cover_their_range() -> None:
    write = Step("write", "a", "", 0, 512, 4)
    for step in (Step("dwrite", "a", "", 512, 512, 5), Step("msync", "a", "", 512, 512)):
        program = small(write, Step("store", "a", "", 512, 512, 5), step)
        assert differences(program, {"a": entry(1, 5, 1, 1)}) == []
        assert differences(program, {"a": entry(4, 5, 1, 1)}) == []
        assert differences(program, {"a": entry(4, 1, 1, 1)}) != []


def test_a_size_is_between_the_sizes_since_it_was_durable() -> None:
    program = small(Step("truncate", "a", length=512), Step("write", "a", "", 512, 1024, 5))
    for legal in ((1, 1, 1, 1), (1,), (1, 5), (1, 5, 5), (1, 0, 0, 0)):
        assert differences(program, {"a": entry(*legal)}) == [], legal
    assert differences(program, {"a": entry()}) == ["a: has 0 bytes, not 512 to 2048"]
    assert differences(program, {"a": entry(1, 1, 1, 1, 0)}) != []


def test_a_name_is_durable_after_fsync_of_its_folder() -> None:
    program = small(Step("create", "b"), Step("fsync", "b"))
    assert differences(program, {"a": entry(1, 1, 1, 1)}) == []
    program = small(Step("create", "b"), Step("fsync", "."))
    assert differences(program, {"a": entry(1, 1, 1, 1)}) == ["b: missing"]
    program = small(Step("unlink", "a"), Step("fsync", "."))
    assert differences(program, {}) == []
    assert differences(program, {"a": entry(1, 1, 1, 1)}) == ["a: exists"]


def test_rename_is_atomic() -> None:
    program = small(
        Step("create", "b"), Step("write", "b", "", 0, 512, 6), SYNC, Step("rename", "b", "a")
    )
    old, new = entry(1, 1, 1, 1, inode=1), entry(6, inode=2)
    assert differences(program, {"a": old, "b": new}) == []
    assert differences(program, {"a": new}) == []
    assert differences(program, {"b": new}) == ["a: missing"]
    # Both names, but one link.
    assert differences(program, {"a": new, "b": new}) == ["a, b: 1 links"]
    assert differences(program, {"a": entry(6, 6, inode=3), "b": new}) != []


def test_what_was_never_created_and_what_cannot_be_read() -> None:
    program = small()
    found = {"a": entry(1, 1, 1, 1), "x": entry(inode=2)}
    assert differences(program, found) == ["x: exists, but was never created"]
    broken = dataclasses.replace(entry(), errno=5)
    assert differences(program, {"a": broken}) == ["a: cannot be read, errno 5"]
    folder = dataclasses.replace(entry(), folder=True)
    assert differences(program, {"a": folder}) == ["a: is a folder"]


def test_a_file_whose_folder_is_not_durable_may_be_missing_with_it() -> None:
    program = small(Step("mkdir", "d"), Step("create", "d/b"), Step("fsync", "d"))
    there = {"a": entry(1, 1, 1, 1)}
    folder = Entry(folder=True, inode=9, links=2, size=0, sectors=())
    assert differences(program, there) == []
    assert differences(program, {**there, "d": folder}) == ["d/b: missing"]


@pytest.mark.parametrize(
    ("step", "text"),
    [
        (Step("create", "a"), "a exists"),
        (Step("unlink", "b"), "b does not exist"),
        (Step("create", "d/b"), "d does not exist"),
        (Step("store", "a", "", 2048, 512, 5), "beyond the end"),
        (Step("write", "a", "", 100, 512, 5), "not in whole sectors"),
        (Step("truncate", "a", length=100), "not in whole sectors"),
        (Step("jump", "a"), "unknown verb"),
    ],
)
def test_a_step_that_cannot_succeed(step: Step, text: str) -> None:
    program = small(step)
    with pytest.raises(ValueError, match=text):
        program.expected(4)


def test_generated_programs_are_possible_and_repeatable(host: Host) -> None:
    chosen = list(programs(dice(), 180))
    assert chosen == list(programs(dice(), 180))
    pairs = [steps for _, steps in chosen if len(steps) > 4]
    assert len(pairs) > 30
    for steps in pairs[-10:]:
        states = host.states([*BEFORE, *steps])
        assert differences(Program([*BEFORE, *steps]), states[-1]) == []


def test_the_tool_counts_completed_steps(host: Host) -> None:
    host.states([])
    host.run(*BEFORE)
    assert host.count() == len(BEFORE)
    report = host.run(Step("create", "x"), Step("create", "a"), Step("create", "y"), status=1)
    assert [step.error for step in report.steps] == ["", "EEXIST"]
    assert host.count() == len(BEFORE) + 1
    assert "y" not in host.tree()


@pytest.mark.parametrize(
    "word",
    ["jump=a", "create", "create=", "create=a:1", "rename=a", "rename=a:", "write=a:1:2",
     "write=a:1:2:3:4", "write=a:-1:2:3", "truncate=a:x"],
)  # fmt: skip
def test_the_tool_refuses_other_steps(host: Host, word: str, binary: Path, tmp_path: Path) -> None:
    host.states([])
    words = [str(binary), "run", str(tmp_path / "files"), str(tmp_path / "counter")]
    words += ["create=z", word]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert host.tree() == {}


def test_a_report_with_a_gap_is_not_believed() -> None:
    text = (
        '{"tool":"powercut","version":1,"verb":"tree","entries":[{"path":"./a","folder":false,'
        '"inode":1,"links":1,"size":1024,"content":[[0,1,7]],"errno":0}]}'
    )
    with pytest.raises(ProbeError, match="1 sectors"):
        read_report(_TreeReport, text, 0)


def test_the_tool_compiles_for_the_guest(tmp_path: Path) -> None:
    target = tmp_path / "powercut"
    assert is_ppc64le(compile_on_host("powercut", target, "-static", compiler=FOR_THE_GUEST))
