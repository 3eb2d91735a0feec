# SPDX-License-Identifier: GPL-2.0-or-later
"""Cache: entries are complete in spite of interrupted, damaged or concurrent builds."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from paprscm.errors import ConfigError, HostError
from paprscm.host.cache import MANIFEST, Cache, CacheEntry

FIELDS = {"version": "1", "compiler": "gcc 12"}


def build_hello(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "hello").write_text("hello\n")


def never(_folder: Path) -> None:
    raise AssertionError("built twice")


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def leftovers(cache: Cache) -> list[Path]:
    return list(cache.root.glob("*/.*"))


def test_second_time_nothing_is_built(cache: Cache) -> None:
    first = cache.ensure("thing", FIELDS, build_hello)
    assert cache.ensure("thing", FIELDS, never).path == first.path
    assert (first.path / "sub" / "hello").read_text() == "hello\n"


def test_other_fields_are_another_entry(cache: Cache) -> None:
    first = cache.ensure("thing", FIELDS, build_hello)
    assert cache.ensure("thing", {**FIELDS, "version": "2"}, build_hello).path != first.path


def test_folders_are_private(cache: Cache) -> None:
    entry = cache.ensure("thing", FIELDS, build_hello)
    for folder in (cache.root, entry.path.parent, entry.path):
        assert folder.stat().st_mode & 0o077 == 0, folder


@pytest.mark.parametrize("how", ["cut", "changed", "removed", "manifest", "half a manifest"])
def test_damage_is_detected_and_repaired(cache: Cache, how: str) -> None:
    entry = cache.ensure("thing", FIELDS, build_hello)
    hello = entry.path / "sub" / "hello"
    if how == "cut":
        os.truncate(hello, 2)
    elif how == "changed":
        hello.write_text("hullo\n")
    elif how == "removed":
        hello.unlink()
    elif how == "manifest":
        (entry.path / MANIFEST).unlink()
    else:
        os.truncate(entry.path / MANIFEST, 30)
    assert cache.find("thing", FIELDS) is None
    again = cache.ensure("thing", FIELDS, build_hello)
    assert (again.path / "sub" / "hello").read_text() == "hello\n"
    assert leftovers(cache) == []


def test_a_touched_but_equal_file_is_not_damage(cache: Cache) -> None:
    entry = cache.ensure("thing", FIELDS, build_hello)
    os.utime(entry.path / "sub" / "hello", (1, 1))
    assert cache.ensure("thing", FIELDS, never).path == entry.path


def test_a_failed_build_leaves_nothing(cache: Cache) -> None:
    def fails(folder: Path) -> None:
        build_hello(folder)
        (folder / "sub").chmod(0o500)
        raise ConfigError("no such option")

    with pytest.raises(ConfigError, match="no such option"):
        cache.ensure("thing", FIELDS, fails)
    assert cache.entries() == []
    assert leftovers(cache) == []


def test_a_build_without_space_is_not_begun(cache: Cache) -> None:
    with pytest.raises(HostError, match="cache prune"):
        cache.ensure("thing", FIELDS, never, needs_bytes=1 << 60)


def test_no_space_left_is_a_host_error(cache: Cache) -> None:
    def full(folder: Path) -> None:
        with Path("/dev/full").open("w") as file:
            file.write("x")

    with pytest.raises(HostError, match=r"no space left in the cache .*cache prune"):
        cache.ensure("thing", FIELDS, full)


@pytest.mark.parametrize("where", ["/proc/cache", "/dev/null/cache"])
def test_a_cache_that_cannot_be_written_is_an_error(where: str) -> None:
    with pytest.raises(HostError, match="set cache_dir"):
        Cache(Path(where)).ensure("thing", FIELDS, never)


# A shell without job control starts background processes with SIGINT ignored.
BUILDER = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from pathlib import Path
from paprscm.host.cache import Cache
from paprscm import log
log.to_terminal()
def build(folder):
    (folder / "begun").write_text("x")
    print("building", flush=True)
    time.sleep(float(sys.argv[2]))
entry = Cache(Path(sys.argv[1])).ensure("thing", {"a": "b"}, build)
print("done", entry.path)
"""


def builder(cache: Cache, seconds: float) -> subprocess.Popen[str]:
    argv = [sys.executable, "-c", BUILDER, str(cache.root), str(seconds)]
    return subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1
    )


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_after_an_interrupted_build_the_next_one_is_clean(
    cache: Cache, number: signal.Signals
) -> None:
    with builder(cache, 60) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "building\n"
        process.send_signal(number)
        process.wait(10)
    assert cache.find("thing", {"a": "b"}) is None
    entry = cache.ensure("thing", {"a": "b"}, build_hello)
    assert (entry.path / "sub" / "hello").exists()
    assert leftovers(cache) == []


def test_one_of_two_runs_builds_and_the_other_waits(cache: Cache) -> None:
    with builder(cache, 1.5) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "building\n"
        second = subprocess.run(
            [sys.executable, "-c", BUILDER, str(cache.root), "0"],
            capture_output=True,
            text=True,
            check=True,
        )
        rest = first.stdout.read()
    assert f"another run (pid {first.pid}) builds the thing; waiting for it" in second.stderr
    assert "building" not in second.stdout
    assert second.stdout.split() == rest.split()


def entry_named(cache: Cache, name: str, *, used_days_ago: float) -> CacheEntry:
    entry = cache.ensure("thing", {"name": name}, build_hello)
    when = time.time() - used_days_ago * 86400
    os.utime(entry.path, (when, when))
    return entry


def test_prune_removes_only_unused_entries(cache: Cache) -> None:
    old = entry_named(cache, "old", used_days_ago=40)
    new = entry_named(cache, "new", used_days_ago=1)
    removed = cache.prune(unused_for_s=30 * 86400)
    assert [entry.path for entry in removed] == [old.path]
    assert not old.path.exists()
    assert [entry.path for entry in cache.entries()] == [new.path]


def test_a_build_keeps_the_newest_entries_of_its_kind(cache: Cache) -> None:
    with cache.workspace("tree", {"source": "/linux"}, purpose="builds"):
        pass
    first, second = (entry_named(cache, name, used_days_ago=9 - n) for n, name in enumerate("ab"))
    assert cache.ensure("thing", first.fields, never, keep=1).path == first.path
    third = cache.ensure("thing", {"name": "c"}, build_hello, keep=2)
    assert {entry.path for entry in cache.entries("thing")} == {first.path, third.path}
    assert not second.path.exists()
    assert len(cache.entries()) == 3


def test_prune_skips_an_entry_that_is_being_built(cache: Cache) -> None:
    entry = entry_named(cache, "busy", used_days_ago=40)
    with cache.lock(f"thing-{entry.key}", purpose="builds the thing"):
        assert cache.prune(unused_for_s=0) == []
    assert entry.path.exists()


def test_a_workspace_keeps_its_files_and_is_not_pruned_while_it_is_held(cache: Cache) -> None:
    fields = {"source": "/linux"}
    with cache.workspace("tree", fields, purpose="builds") as folder:
        (folder / "object").write_text("x")
        assert cache.prune(unused_for_s=0) == []
    with cache.workspace("tree", fields, purpose="builds") as again:
        assert (again, (folder / "object").read_text()) == (folder, "x")
    [entry] = cache.entries()
    assert (entry.is_workspace, entry.fields) == (True, fields)
    assert [entry.path for entry in cache.prune(unused_for_s=0)] == [folder]
    assert not folder.exists()
