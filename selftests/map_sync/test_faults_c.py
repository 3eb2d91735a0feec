# SPDX-License-Identifier: GPL-2.0-or-later
"""guest_tools/faults.c, compiled and run on the host: it detects a faulty file system."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from guest_tool import FOR_THE_GUEST, compile_on_host, is_ppc64le

from paprscm.errors import ContractError
from paprscm.guest.report import read_report
from paprscm.map_sync.fault_load import (
    FaultLoadReport,
    FaultVerifyReport,
    expect_load,
    expect_verified,
)
from paprscm.paths import GUEST_TOOLS

SEED = 3


@pytest.fixture(scope="module")
def binary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_on_host("faults", tmp_path_factory.mktemp("faults") / "faults")


def _run(binary: Path, *words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([binary, *words], capture_output=True, text=True, timeout=60, check=False)


def _load(binary: Path, base: Path, *options: str) -> FaultLoadReport:
    for name in ("files", "expected"):
        (base / name).mkdir()
    words = ["load", f"--seed={SEED}", "--sync=off", f"--expected={base / 'expected'}"]
    words += ["--any-file", "--operations=400", *options, str(base / "files")]
    result = _run(binary, *words)
    return read_report(FaultLoadReport, result.stdout, result.returncode, result.stderr)


def _verify(binary: Path, base: Path) -> FaultVerifyReport:
    expected = f"--expected={base / 'expected'}"
    result = _run(binary, "verify", f"--seed={SEED}", expected, base / "files")
    return read_report(FaultVerifyReport, result.stdout, result.returncode, result.stderr)


@pytest.fixture
def base(binary: Path, tmp_path: Path) -> Path:
    """Files of a load, and their expected content."""
    assert _load(binary, tmp_path).error_count == 0
    return tmp_path


def _largest(base: Path) -> Path:
    """The largest file of a single thread that is not only holes: on a busy host one may be."""
    files = (base / "files").glob("[ab]/*")
    return max(files, key=lambda file: (any(file.read_bytes()), file.stat().st_size))


def test_compiles_for_the_guest(tmp_path: Path) -> None:
    assert is_ppc64le(compile_on_host("faults", tmp_path / "faults", compiler=FOR_THE_GUEST))


def test_a_healthy_file_system(binary: Path, tmp_path: Path) -> None:
    load = _load(binary, tmp_path)
    expect_load(load)
    assert (load.seed, load.sync, load.threads) == (SEED, False, 8)
    verified = _verify(binary, tmp_path)
    expect_verified(verified, load)
    assert verified.files > 8
    assert verified.bytes == sum(
        file.stat().st_size for file in (tmp_path / "expected").iterdir() if file.name != "index"
    )


def test_bounds(binary: Path, tmp_path: Path) -> None:
    """Threads, operations and time are as requested."""
    load = _load(binary, tmp_path, "--threads=3", "--operations=20")
    assert load.threads == 3
    assert 0 < sum(load.operations.values()) <= 3 * 20 * 2
    (tmp_path / "again").mkdir()
    limited = _load(binary, tmp_path / "again", "--operations=100000000", "--limit=1")
    assert 1e9 <= limited.duration_ns < 20e9
    assert limited.error_count == 0


@pytest.mark.parametrize("kind", ["sanitize=address,undefined", "sanitize=thread"])
def test_sanitizers(tmp_path: Path, kind: str) -> None:
    """The threads race only in the arena, where all stores of a word are equal."""
    binary = tmp_path / "faults"
    done = subprocess.run(
        ["gcc", "-g", "-O1", f"-f{kind}", "-o", binary, GUEST_TOOLS / "faults.c"],
        capture_output=True,
        check=False,
    )
    if done.returncode:
        pytest.skip(f"gcc has no -f{kind}")
    for name in ("files", "expected"):
        (tmp_path / name).mkdir()
    result = subprocess.run(
        [
            *(binary, "load", f"--seed={SEED}", "--sync=off", "--any-file", "--operations=150"),
            *(f"--expected={tmp_path / 'expected'}", tmp_path / "files"),
        ],
        env={"ASAN_OPTIONS": "detect_leaks=0"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if "FATAL: ThreadSanitizer" in result.stderr:
        pytest.skip("ThreadSanitizer does not run on this kernel")
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize(
    ("call", "what"),
    [
        # File systems on which a call succeeds, but does nothing.
        ("#define fallocate(fd, mode, at, size) ((mode) ? 0 : fallocate(fd, mode, at, size))", ""),
        ("#define ftruncate(fd, size) ((void)(fd), (void)(size), 0)", "SIGBUS"),
        ("#define renameat(a, b, c, d) ((void)(b), (void)(d), 0)", "errno 2"),
        ("#define unlinkat(a, b, c) ((void)(a), (void)(b), 0)", None),
        # One that loses the last word, and ones that fail.
        ("#define pread(fd, to, size, at) (pread(fd, to, size, at) - 8)", "read"),
        ("#define fsync(fd) (errno = 5, (void)(fd), -1)", "errno 5"),
        ("#define msync(map, size, how) (errno = 5, (void)(map), -1)", "errno 5"),
    ],
)
def test_a_file_system_that_lies(tmp_path: Path, call: str, what: str | None) -> None:
    def lie(text: str) -> str:
        cut = text.index("\n", text.rindex("#include")) + 1
        return text[:cut] + call + "\n" + text[cut:]

    binary = compile_on_host("faults", tmp_path / "liar", change=lie)
    load = _load(binary, tmp_path)
    if what is None:
        # Only the remaining names show it.
        assert load.error_count == 0
        verified = _verify(binary, tmp_path)
        assert any("files, not" in error for error in verified.errors)
        return
    assert load.error_count
    assert any(what in error for error in load.errors)
    with pytest.raises(ContractError, match="under load"):
        expect_load(load)


@pytest.mark.parametrize("place", [8, 1000, -1])
def test_a_damaged_byte_is_named(binary: Path, base: Path, place: int) -> None:
    file = _largest(base)
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)
    report = _verify(binary, base)
    name = f"{file.parent.name}/{file.name}"
    offset = place % len(content)
    assert f"thread 0: verify {name}: byte {offset:#x} " in report.errors[0]
    assert f"verify {name}: the checksum is" in report.errors[1]
    assert report.error_count == 2


def test_a_damaged_stripe_is_named(binary: Path, base: Path) -> None:
    with (base / "files" / "stripes").open("r+b") as opened:
        opened.seek(100)
        old = opened.read(1)
        opened.seek(100)
        opened.write(bytes([old[0] ^ 0xFF]))
    assert "verify stripes: byte 0x64 is" in _verify(binary, base).errors[0]


def test_a_lost_page_is_named(binary: Path, base: Path) -> None:
    file = _largest(base)
    content = file.read_bytes()
    stored = next(at for at in range(0, len(content), 4096) if any(content[at : at + 4096]))
    file.write_bytes(content[:stored] + bytes(4096) + content[stored + 4096 :])
    report = _verify(binary, base)
    assert f"verify {file.parent.name}/{file.name}: byte" in report.errors[0]
    assert " is 0x00, not " in report.errors[0]


def test_a_short_and_a_long_file_are_named(binary: Path, base: Path) -> None:
    file = _largest(base)
    size = file.stat().st_size
    for wrong in (size - 8, size + 8):
        with file.open("r+b") as opened:
            opened.truncate(wrong)
        assert f"it has {wrong} bytes, not {size}" in _verify(binary, base).errors[0]


def test_lost_and_additional_files_are_named(binary: Path, base: Path) -> None:
    (base / "files" / "a" / "more").touch()
    assert "files, not" in _verify(binary, base).errors[0]
    (base / "files" / "a" / "more").unlink()
    file = _largest(base)
    file.unlink()
    report = _verify(binary, base)
    assert f"verify {file.parent.name}/{file.name}: it is missing" in report.errors[0]
    assert "files, not" in report.errors[1]


def test_a_foreign_word_in_the_arena_is_named(binary: Path, base: Path) -> None:
    with (base / "files" / "arena").open("r+b") as opened:
        opened.truncate(64)
        opened.seek(16)
        opened.write(b"12345678")
    errors = _verify(binary, base).errors
    assert (
        "arena: the word at 0x10 is 0x3837363534333231, which no thread stored there" in errors[0]
    )


def test_damaged_expectations_are_not_a_verdict(binary: Path, base: Path) -> None:
    """It is an error of the suite, not of the file system."""
    (base / "expected" / "stripes").write_bytes(b"other")
    result = _run(
        *(binary, "verify", f"--seed={SEED}", f"--expected={base / 'expected'}", base / "files")
    )
    assert (result.returncode, result.stdout) == (4, "")
    assert "the expected content is damaged" in result.stderr


def test_files_must_be_dax(binary: Path, tmp_path: Path) -> None:
    for name in ("files", "expected"):
        (tmp_path / name).mkdir()
    result = _run(
        *(binary, "load", "--seed=1", "--sync=off", f"--expected={tmp_path / 'expected'}"),
        tmp_path / "files",
    )
    assert (result.returncode, result.stdout) == (4, "")
    assert "not DAX" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["load"],
        ["lose", "dir"],
        ["load", "--seed=1", "--sync=on", "dir"],
        ["load", "--seed=1", "--expected=e", "dir"],
        ["load", "--sync=on", "--expected=e", "dir"],
        ["load", "--seed=1", "--sync=maybe", "--expected=e", "dir"],
        ["load", "--seed=1", "--sync=on", "--expected=e", "--threads=0", "dir"],
        ["load", "--seed=1", "--sync=on", "--expected=e", "--threads=65", "dir"],
        ["load", "--seed=1", "--sync=on", "--expected=e", "--limit=9999", "dir"],
        ["verify", "--seed=1", "dir"],
        ["verify", "--seed=1", "--expected=e", "one", "two"],
        ["verify", "--seed=x", "--expected=e", "dir"],
        ["verify", "--bogus", "--seed=1", "--expected=e", "dir"],
    ],
)
def test_usage(binary: Path, tmp_path: Path, arguments: list[str]) -> None:
    result = subprocess.run(
        [binary, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert "usage: faults" in result.stderr
    assert list(tmp_path.iterdir()) == []
