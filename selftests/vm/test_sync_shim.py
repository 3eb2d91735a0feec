# SPDX-License-Identifier: GPL-2.0-or-later
"""host_tools/flush_shim.c, preloaded into a small multithreaded program and into QEMU."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile

from paprscm.debian.packages import Archive
from paprscm.emulator import binary
from paprscm.emulator.capabilities import sanitizers
from paprscm.errors import CapabilityError, ContractError, HostError
from paprscm.host.cache import Cache
from paprscm.host.process import Process
from paprscm.vm import shim_layout, sync_shim
from paprscm.vm.shim_layout import FLUSHES as OPERATIONS
from paprscm.vm.shim_layout import Injected, Operation
from paprscm.vm.sync_shim import FALLIBLE, Counts, Shim, WatchedFile

PAGE = os.sysconf("SC_PAGESIZE")
RING = 65536

# Preloaded before the C library and instead of libpmem: counts the calls that the shim passes on.
REAL = """
#define _GNU_SOURCE
#include <stddef.h>
#include <sys/syscall.h>
#include <unistd.h>

unsigned long real_calls[4];

#define COUNT(n) __atomic_add_fetch(&real_calls[n], 1, __ATOMIC_SEQ_CST)

int fdatasync(int fd) { COUNT(0); return syscall(SYS_fdatasync, fd); }
int fsync(int fd) { COUNT(1); return syscall(SYS_fsync, fd); }
int msync(void *a, size_t n, int flags) { COUNT(2); return syscall(SYS_msync, a, n, flags); }
void pmem_persist(const void *a, size_t n) { (void)a; (void)n; COUNT(3); }
"""

# Executes one command per line, and answers each with a line.
PROGRAM = """
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

extern unsigned long real_calls[4];
void pmem_persist(const void *, size_t);

static struct job {
	pthread_t thread;
	char path[512];
	int operation, calls, *errors;
} jobs[16];
static int n_jobs;

static void *work(void *data)
{
	struct job *job = data;
	int result, fd = open(job->path, O_RDWR);
	void *map = MAP_FAILED;

	if (job->operation > 1)
		map = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	for (int i = 0; i < job->calls; i++) {
		result = 0;
		switch (job->operation) {
		case 0: result = fdatasync(fd); break;
		case 1: result = fsync(fd); break;
		case 2: result = msync(map, 4096, MS_SYNC); break;
		case 3: pmem_persist(map, 4096); break;
		}
		job->errors[i] = result ? errno : 0;
	}
	if (map != MAP_FAILED)
		munmap(map, 4096);
	close(fd);
	return NULL;
}

static void start(const char *path, int operation, int threads, int calls)
{
	while (threads--) {
		struct job *job = &jobs[n_jobs++];

		strcpy(job->path, path);
		job->operation = operation;
		job->calls = calls;
		job->errors = calloc(calls, sizeof(int));
		pthread_create(&job->thread, NULL, work, job);
	}
}

/* The errno of each call, thread by thread. */
static void join(void)
{
	for (int i = 0; i < n_jobs; i++) {
		pthread_join(jobs[i].thread, NULL);
		for (int call = 0; call < jobs[i].calls; call++)
			printf("%d ", jobs[i].errors[call]);
		free(jobs[i].errors);
	}
	n_jobs = 0;
}

int main(void)
{
	char line[1024], path[512];
	int a, b, c;
	size_t length;
	void *address;

	while (fgets(line, sizeof(line), stdin)) {
		if (sscanf(line, "start %d %d %d %511s", &a, &b, &c, path) == 4) {
			start(path, a, b, c);
		} else if (!strncmp(line, "join", 4)) {
			join();
		} else if (!strncmp(line, "real", 4)) {
			for (int i = 0; i < 4; i++)
				printf("%lu ", real_calls[i]);
		} else if (sscanf(line, "map %p %zu %511s", &address, &length, path) == 3) {
			int fd = open(path, O_RDWR), prot = PROT_READ | PROT_WRITE;
			int flags = fd < 0 ? MAP_SHARED | MAP_ANONYMOUS : MAP_SHARED;

			/* QEMU calls mmap64(); other programs call mmap(). */
			if (address)
				address = mmap64(address, length, prot, flags | MAP_FIXED, fd, 0);
			else
				address = mmap(NULL, length, prot, flags, fd, 0);
			printf("%p", address);
			if (fd >= 0)
				close(fd);
		} else if (sscanf(line, "unmap %p %zu", &address, &length) == 2) {
			printf("%d", munmap(address, length) ? errno : 0);
		} else if (sscanf(line, "msync %p %zu %d", &address, &length, &a) == 3) {
			printf("%d", msync(address, length, a) ? errno : 0);
		} else if (sscanf(line, "persist %p %zu", &address, &length) == 2) {
			pmem_persist(address, length);
		} else if (!strncmp(line, "sh ", 3)) {
			printf("%d", system(line + 3));
		}
		putchar('\\n');
		fflush(stdout);
	}
	return 0;
}
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return Cache(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def library(cache: Cache) -> Path:
    return sync_shim.build(cache)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("program")
    (folder / "real.c").write_text(REAL)
    # The same symbol version as in libpmem.
    (folder / "real.map").write_text("LIBPMEM_1.0 { global: pmem_persist; };\n")
    (folder / "program.c").write_text(PROGRAM)
    cc = ["cc", "-O2", "-Wall", "-Werror", "-pthread"]
    for words in (
        ["-shared", "-fPIC", "-Wl,--version-script=real.map", "-o", "libreal.so", "real.c"],
        ["-o", "program", "program.c", "-L.", "-lreal", f"-Wl,-rpath,{folder}"],
    ):
        subprocess.run([*cc, *words], cwd=folder, check=True)
    return folder / "program"


@pytest.fixture
def flushes(library: Path) -> Iterator[Shim]:
    with Shim(library, seed=7) as shim:
        yield shim


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "dimm"
    file.write_bytes(bytes(16 * PAGE))
    return file


@pytest.fixture
def file(flushes: Shim, path: Path) -> WatchedFile:
    return flushes.watch(path)


class Driver:
    """The program above, controlled by commands."""

    def __init__(self, *argv: str | Path, pass_fds: tuple[int, ...] = ()) -> None:
        self.process = subprocess.Popen(
            argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=pass_fds,
            text=True,
            bufsize=1,
        )
        # Also ends a test whose call hangs by mistake.
        self._limit = threading.Timer(30, self.process.kill)
        self._limit.start()

    def ask(self, line: str) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        return self.answer()

    def answer(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the program ended: status {self.process.wait()}"
        return line.strip()

    def start(self, operation: Operation, path: Path, *, threads: int = 1, calls: int = 1) -> None:
        self.ask(f"start {operation.value} {threads} {calls} {path}")

    def join(self) -> list[int]:
        return [int(word) for word in self.ask("join").split()]

    def call(
        self, operation: Operation, path: Path, *, threads: int = 1, calls: int = 1
    ) -> list[int]:
        """The errno of each call, thread by thread."""
        self.start(operation, path, threads=threads, calls=calls)
        return self.join()

    def real(self) -> list[int]:
        """Number of real calls, by operation."""
        return [int(word) for word in self.ask("real").split()]

    def map(self, path: Path | str, pages: int, address: int = 0) -> int:
        """Map the file, or memory if it does not exist; return the address."""
        return int(self.ask(f"map {address:#x} {pages * PAGE} {path}"), 16)

    def unmap(self, address: int, pages: int) -> int:
        return int(self.ask(f"unmap {address:#x} {pages * PAGE}"))

    def persist(self, address: int, length: int = 1) -> None:
        self.ask(f"persist {address:#x} {length}")

    def msync(self, address: int, length: int, flags: int = 4) -> int:
        return int(self.ask(f"msync {address:#x} {length} {flags}"))

    def shell(self, command: str) -> list[str]:
        """Run a command in a child; return its output."""
        lines = [self.ask(f"sh {command}; echo end")]
        while lines[-1] != "end":
            lines.append(self.answer())
        self.answer()
        return lines[:-1]

    def end(self) -> None:
        self._limit.cancel()
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def driver(flushes: Shim, program: Path) -> Iterator[Driver]:
    driver = Driver(*flushes.prefix(), program, pass_fds=flushes.pass_fds)
    yield driver
    driver.end()


def test_each_call_is_counted_and_recorded_once(
    flushes: Shim, file: WatchedFile, path: Path, driver: Driver
) -> None:
    before = time.monotonic_ns()
    for operation in OPERATIONS:
        assert driver.call(operation, path, threads=4, calls=250) == [0] * 1000
        counts = file.counts(operation)
        assert (counts.begun, counts.ended, counts.failed) == (1000, 1000, 0)
        assert 1 <= counts.most_in_flight <= 4
    assert file.counts().ended == 4000
    assert driver.real() == [1000] * 4
    records = flushes.records()
    assert [record.number for record in records] == list(range(4000))
    for operation in OPERATIONS:
        of_it = records[operation * 1000 : operation * 1000 + 1000]
        assert {record.operation for record in of_it} == {operation}
        assert sorted(Counter(record.thread for record in of_it).values()) == [250] * 4
    assert {(record.path, record.result, record.injected) for record in records} == {(path, 0, 0)}
    for record in records:
        assert record.end_ns is not None
        assert before < record.begin_ns <= record.end_ns < time.monotonic_ns()
    assert flushes.records(since=3990) == records[3990:]
    assert flushes.records(since=4000) == []


def test_other_files_are_not_affected(
    flushes: Shim, file: WatchedFile, path: Path, driver: Driver, tmp_path: Path
) -> None:
    file.fail(errno.EIO)
    file.hang()
    (tmp_path / "folder").mkdir()
    other = tmp_path / "folder" / path.name
    other.write_bytes(bytes(PAGE))
    for operation in OPERATIONS:
        assert driver.call(operation, other, calls=3) == [0] * 3
    # The watched name is another file now; ext4 would give it the same inode.
    path.unlink()
    path.write_bytes(bytes(PAGE))
    assert driver.call(Operation.FDATASYNC, path) == [0]
    assert driver.real() == [4, 3, 3, 3]
    assert file.counts().begun == 0
    assert flushes.records() == []


def test_the_inode_alone_is_not_the_file(
    flushes: Shim, file: WatchedFile, path: Path, driver: Driver
) -> None:
    flushes._page.file[0].dev += 1
    assert driver.call(Operation.FDATASYNC, path) == [0]
    assert file.counts().begun == 0


def test_a_file_is_known_under_any_name(
    flushes: Shim, file: WatchedFile, path: Path, driver: Driver, tmp_path: Path
) -> None:
    (tmp_path / "hard").hardlink_to(path)
    (tmp_path / "soft").symlink_to(path)
    with path.open() as opened:
        names = [
            path,
            tmp_path / "hard",
            tmp_path / "soft",
            Path(f"/proc/{os.getpid()}/fd/{opened.fileno()}"),
        ]
        for name in names:
            for operation in OPERATIONS:
                driver.call(operation, name)
    assert file.counts().begun == 16
    assert flushes.watch(tmp_path / "hard") is file


def test_files_are_distinguished(
    flushes: Shim, file: WatchedFile, driver: Driver, tmp_path: Path
) -> None:
    paths = [tmp_path / str(number) for number in range(63)]
    for path in paths:
        path.write_bytes(bytes(PAGE))
    files = [flushes.watch(path) for path in paths]
    files[62].fail(errno.ENOSPC)
    assert driver.call(Operation.FDATASYNC, paths[62]) == [errno.ENOSPC]
    assert driver.call(Operation.MSYNC, paths[61]) == [0]
    assert [record.path for record in flushes.records()] == [paths[62], paths[61]]
    assert [f.counts().begun for f in (file, *files)] == [0] * 62 + [1, 1]
    (tmp_path / "63").touch()
    with pytest.raises(HostError, match="63 cannot be watched: 64 files are watched already"):
        flushes.watch(tmp_path / "63")
    with pytest.raises(HostError, match="64 cannot be watched: No such file"):
        flushes.watch(tmp_path / "64")


def test_a_result_of_the_kernel_is_passed_on(
    flushes: Shim, file: WatchedFile, path: Path, driver: Driver
) -> None:
    address = driver.map(path, 1)
    ms_async_and_sync = 5
    assert driver.msync(address, PAGE, ms_async_and_sync) == errno.EINVAL
    (record,) = flushes.records()
    assert (record.result, record.injected) == (errno.EINVAL, Injected(0))
    assert file.counts().failed == 1


def test_the_bytes_that_a_call_covers(
    flushes: Shim, file: WatchedFile, path: Path, driver: Driver
) -> None:
    address = driver.map(path, 4)
    # The rest of the mapping keeps its place in the file.
    driver.unmap(address, 1)
    driver.msync(address + 2 * PAGE, PAGE)
    driver.persist(address + PAGE, 100)
    driver.msync(address + 3 * PAGE, PAGE)
    driver.call(Operation.FDATASYNC, path)
    *parts, whole = flushes.records()
    assert [(part.start, part.end) for part in parts] == [
        (2 * PAGE, 3 * PAGE),
        (PAGE, PAGE + 100),
        (3 * PAGE, 4 * PAGE),
    ]
    assert whole.start == 0
    assert whole.end > 1 << 60
    assert file.partial(4 * PAGE) == parts
    assert file.partial(4 * PAGE, since=3) == []


def test_a_sync_of_the_label_area_is_no_flush(flushes: Shim, path: Path, driver: Driver) -> None:
    file = flushes.watch(path, 2 * PAGE)
    file.hang()
    address = driver.map(path, 4)
    assert driver.msync(address + 2 * PAGE, PAGE) == 0
    assert driver.msync(address + 3 * PAGE, PAGE) == 0
    file.fail(errno.EIO)
    file.release()
    assert driver.msync(address + PAGE, 3 * PAGE) == errno.EIO
    assert file.counts(Operation.LABEL) == Counts(2, 2, 0, 1)
    assert file.counts() == file.counts(Operation.MSYNC) == Counts(1, 1, 1, 1)
    assert [record.start for record in file.records()] == [2 * PAGE, 3 * PAGE, PAGE]
    assert [record.start for record in file.partial(2 * PAGE)] == [PAGE]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_delay_comes_before_the_call(
    flushes: Shim, file: WatchedFile, path: Path, driver: Driver, operation: Operation
) -> None:
    file.delay(0.15)
    driver.start(operation, path)
    file.wait_begun(1, 5)
    assert driver.real()[operation] == 0
    assert driver.join() == [0]
    (record,) = flushes.records()
    assert record.duration_s is not None
    assert 0.15 <= record.duration_s < 5
    assert (record.injected, record.delay_s) == (Injected.DELAYED, 0.15)
    assert driver.real()[operation] == 1


def test_random_delays_depend_on_the_seed(library: Path, program: Path, path: Path) -> None:
    def delays(seed: int, low_s: float = 10e-6, high_s: float = 109e-6) -> list[float]:
        with Shim(library, seed=seed) as flushes:
            file = flushes.watch(path)
            file.delay(low_s, high_s)
            driver = Driver(*flushes.prefix(), program, pass_fds=flushes.pass_fds)
            driver.call(Operation.FSYNC, path, threads=2, calls=100)
            driver.end()
            records = flushes.records()
            assert all(r.duration_s is not None and r.duration_s >= r.delay_s for r in records)
            return sorted(record.delay_s for record in records)

    first = delays(1)
    assert delays(1) == first
    assert delays(2) != first
    assert first[0] >= 10e-6
    assert first[-1] <= 109e-6
    # 200 draws of 100 values hit 87 of them on average.
    assert 70 < len(set(first)) < 100
    assert 50e-6 < sum(first) / 200 < 69e-6
    assert set(delays(1, 4e-6, 5e-6)) == {4e-6, 5e-6}


@pytest.mark.parametrize("operation", FALLIBLE)
@pytest.mark.parametrize(
    ("which", "failing"),
    [
        ({"nth": 1}, [1]),
        ({"nth": 4}, [4]),
        ({"every": 3}, [3, 6, 9]),
        ({"following": 2}, [1, 2]),
        ({}, list(range(1, 11))),
    ],
)
def test_failures_are_exact(
    flushes: Shim,
    file: WatchedFile,
    path: Path,
    driver: Driver,
    operation: Operation,
    which: dict[str, int],
    failing: list[int],
) -> None:
    # Calls are counted from the creation of the rule.
    driver.call(operation, path, calls=2)
    file.fail(errno.EDQUOT, **which)  # type: ignore[arg-type]
    expected = [errno.EDQUOT if n in failing else 0 for n in range(1, 11)]
    assert driver.call(operation, path, calls=10) == expected
    assert driver.real()[operation] == 12 - len(failing)
    assert file.counts(operation).failed == len(failing)
    records = flushes.records(since=2)
    assert [record.result for record in records] == expected
    assert [record.number - 1 for record in records if record.injected] == failing
    # The same rule again begins a new count.
    file.fail(errno.EIO, **which)  # type: ignore[arg-type]
    assert Counter(driver.call(operation, path, calls=10))[errno.EIO] == len(failing)


def test_failures_are_exact_among_threads(flushes: Shim, driver: Driver) -> None:
    # A file whose flush takes no time, so that threads race in the shim itself.
    handle = os.memfd_create("memory")
    path = Path(f"/proc/{os.getpid()}/fd/{handle}")
    file = flushes.watch(path)
    for which, failing in (({"every": 2}, 40000), ({"following": 50000}, 50000)):
        file.fail(errno.EIO, **which)  # type: ignore[arg-type]
        errors = driver.call(Operation.FDATASYNC, path, threads=4, calls=20000)
        assert Counter(errors) == {0: 80000 - failing, errno.EIO: failing}
    counts = file.counts()
    assert (counts.begun, counts.ended, counts.failed) == (160000, 160000, 90000)
    os.close(handle)


def test_a_rule_is_for_the_operations_that_it_names(
    flushes: Shim, file: WatchedFile, path: Path, driver: Driver
) -> None:
    file.fail(errno.EIO, following=2, operations=[Operation.FSYNC])
    file.delay(0.001, operations=[Operation.MSYNC])
    file.hang(operations=[Operation.PMEM_PERSIST])
    assert driver.call(Operation.FDATASYNC, path, calls=3) == [0, 0, 0]
    assert driver.call(Operation.MSYNC, path) == [0]
    assert driver.call(Operation.FSYNC, path, calls=3) == [errno.EIO, errno.EIO, 0]
    driver.start(Operation.PMEM_PERSIST, path)
    file.wait_begun(1, 5, Operation.PMEM_PERSIST)
    file.release()
    driver.join()
    done = [record.injected for record in flushes.records()]
    assert done == [0, 0, 0, Injected.DELAYED, Injected.FAILED, Injected.FAILED, 0, Injected.HUNG]


def test_parts_of_a_rule_are_independent(
    flushes: Shim, file: WatchedFile, path: Path, driver: Driver
) -> None:
    file.fail(errno.EIO, nth=3)
    driver.call(Operation.FDATASYNC, path)
    file.delay(0.001)
    driver.call(Operation.FDATASYNC, path)
    # Neither of these restarts the count.
    file.delay(0.002)
    file.release()
    assert driver.call(Operation.FDATASYNC, path) == [errno.EIO]
    record = flushes.records()[-1]
    assert record.injected == Injected.DELAYED | Injected.FAILED
    assert record.duration_s is not None
    assert record.duration_s >= 0.002
    file.clear()
    assert driver.call(Operation.FDATASYNC, path, calls=5) == [0] * 5
    assert {record.injected for record in flushes.records(since=3)} == {Injected(0)}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_hung_calls_wait_for_their_release(
    flushes: Shim, file: WatchedFile, path: Path, driver: Driver, operation: Operation
) -> None:
    file.hang()
    driver.start(operation, path, threads=3)
    counts = file.wait_begun(3, 5)
    time.sleep(0.03)
    assert file.counts() == counts
    assert (counts.ended, counts.most_in_flight) == (0, 3)
    assert driver.real()[operation] == 0
    for record in flushes.records():
        assert (record.end_ns, record.result, record.duration_s) == (None, None, None)
        assert record.injected == Injected.HUNG
    file.release()
    file.wait_ended(3, 0.5)
    assert driver.join() == [0] * 3
    assert {record.result for record in flushes.records()} == {0}
    # Calls are no longer held.
    assert driver.call(operation, path) == [0]
    assert file.counts(operation).most_in_flight == 3


def test_a_release_is_only_for_calls_that_already_hang(
    file: WatchedFile, path: Path, driver: Driver
) -> None:
    file.hang()
    driver.start(Operation.FDATASYNC, path, threads=2)
    file.wait_begun(2, 5)
    # The calls have no time to wake between the two.
    file.release()
    file.hang()
    file.wait_ended(2, 0.5)
    driver.start(Operation.FDATASYNC, path)
    file.wait_begun(3, 5)
    # Another rule does not release the call.
    file.hang(operations=[Operation.FSYNC])
    file.fail(errno.EIO)
    time.sleep(0.03)
    assert file.counts().ended == 2
    file.clear()
    file.wait_ended(3, 0.5)
    # The rule at the begin of a call applies.
    assert driver.join() == [0] * 3


def test_the_end_of_the_shim_releases_calls(library: Path, program: Path, path: Path) -> None:
    with Shim(library) as flushes:
        file = flushes.watch(path)
        file.hang()
        driver = Driver(*flushes.prefix(), program, pass_fds=flushes.pass_fds)
        driver.start(Operation.FSYNC, path)
        file.wait_begun(1, 5)
    assert driver.join() == [0]
    driver.end()
    assert file.counts().ended == 1
    assert flushes.records()[0].result == 0


def test_a_new_rule_applies_from_the_next_call(
    file: WatchedFile, path: Path, driver: Driver
) -> None:
    for number in range(1, 300):
        file.fail(number, nth=1 + number % 2)
        expected = [0, number] if number % 2 else [number, 0]
        assert driver.call(Operation.FSYNC, path, calls=2) == expected


def test_no_call_sees_half_a_rule(
    flushes: Shim, file: WatchedFile, path: Path, driver: Driver
) -> None:
    file.fail(errno.EIO, operations=[Operation.FDATASYNC])
    driver.start(Operation.FDATASYNC, path, threads=2, calls=8000)
    driver.start(Operation.FSYNC, path, threads=2, calls=8000)
    changes = 0
    while file.counts().ended < 32000:
        file.fail(errno.ENOSPC, operations=[Operation.FSYNC])
        file.fail(errno.EIO, operations=[Operation.FDATASYNC])
        changes += 2
    errors = driver.join()
    assert changes > 20
    assert set(errors[:16000]) <= {0, errno.EIO}
    assert set(errors[16000:]) <= {0, errno.ENOSPC}
    # Each call obeyed one of the two rules.
    results = Counter((record.operation, record.result) for record in flushes.records())
    assert results[Operation.FDATASYNC, errno.EIO] > 0
    assert results[Operation.FSYNC, errno.ENOSPC] > 0


def test_invalid_rules(file: WatchedFile) -> None:
    for times in ((-1.0, 1.0), (2.0, 1.0), (0.0, 3601.0), (float("nan"),)):
        with pytest.raises(ValueError, match="delay"):
            file.delay(*times)
    for number, which in (
        (0, {}),
        (4096, {}),
        (5, {"nth": 0}),
        (5, {"every": 1 << 32}),
        (5, {"nth": 1, "following": 1}),
    ):
        with pytest.raises(ValueError, match=rf"fail\({number}"):
            file.fail(number, **which)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="pmem_persist cannot fail"):
        file.fail(5, operations=[Operation.FSYNC, Operation.PMEM_PERSIST])


def test_a_mapping_is_followed_to_its_end(
    file: WatchedFile, path: Path, driver: Driver, tmp_path: Path
) -> None:
    """Like QEMU: reserve more than needed, map the file into it, unmap the rest."""
    other = tmp_path / "other"
    other.write_bytes(bytes(16 * PAGE))

    def seen(address: int, length: int = 1) -> bool:
        before = file.counts().begun
        driver.persist(address, length)
        return file.counts().begun > before

    start = driver.map("-", 8)
    assert not seen(start)
    assert driver.map(path, 8, start) == start
    assert driver.unmap(start + 6 * PAGE, 2) == 0
    assert [seen(start + page * PAGE) for page in range(8)] == [True] * 6 + [False] * 2
    # Ranges that end or begin in the mapping.
    assert not seen(start - PAGE, PAGE)
    assert seen(start - PAGE, PAGE + 1)
    assert seen(start + 6 * PAGE - 1)
    # A hole, then another mapping in it.
    assert driver.unmap(start + 2 * PAGE, 1) == 0
    driver.map(other, 1, start + 2 * PAGE)
    driver.map("-", 1, start + 3 * PAGE)
    assert [seen(start + page * PAGE) for page in range(6)] == [True] * 2 + [False] * 2 + [True] * 2
    # A refused munmap() changes nothing; a length is rounded up to pages.
    assert driver.unmap(start + 1, 1) == errno.EINVAL
    assert seen(start)
    assert int(driver.ask(f"unmap {start:#x} 1")) == 0
    assert [seen(start + PAGE - 1), seen(start + PAGE)] == [False, True]
    assert driver.msync(start + PAGE, PAGE) == 0
    assert file.counts(Operation.MSYNC).ended == 1
    assert driver.unmap(start, 8) == 0
    assert not seen(start, 8 * PAGE)


def test_mappings_beyond_the_table_are_reported(
    flushes: Shim, file: WatchedFile, path: Path, driver: Driver
) -> None:
    for _ in range(256):
        address = driver.map(path, 1)
    assert file.counts().begun == 0
    driver.unmap(address, 1)
    driver.map(path, 1)
    assert flushes.records() == []
    driver.map(path, 1)
    for ask in (flushes.records, file.counts):
        with pytest.raises(HostError, match="1 mappings of watched files are unknown"):
            ask()


def test_children_are_not_affected(file: WatchedFile, path: Path, driver: Driver) -> None:
    variables = {line.partition("=")[0] for line in driver.shell("env")}
    assert "PATH" in variables
    assert not variables & {"LD_PRELOAD", "PAPRSCM_SHIM"}
    assert not [line for line in driver.shell("cat /proc/self/maps") if "flush_shim" in line]
    assert not [line for line in driver.shell("ls -l /proc/self/fd") if "paprscm-shim" in line]
    file.fail(errno.EIO)
    assert driver.shell(f"sync -d {path} && echo synced") == ["synced"]
    assert file.counts().begun == 0
    assert driver.call(Operation.FDATASYNC, path) == [errno.EIO]


def test_the_ring_keeps_the_last_calls(
    flushes: Shim, file: WatchedFile, path: Path, driver: Driver
) -> None:
    file.hang(operations=[Operation.FSYNC])
    driver.start(Operation.FSYNC, path)
    file.wait_begun(1, 5)
    driver.start(Operation.PMEM_PERSIST, path, threads=2, calls=RING // 2)
    file.wait_ended(RING, 60)
    # Its slot belongs to another call now, whose end must not be overwritten.
    slot = flushes.records(since=RING)[0]
    file.release()
    driver.join()
    assert flushes.records(since=RING) == [slot]
    records = flushes.records(since=1)
    assert [record.number for record in records] == list(range(1, RING + 1))
    assert {(record.operation, record.result) for record in records} == {
        (Operation.PMEM_PERSIST, 0)
    }
    with pytest.raises(HostError, match="records 0 to 0 are overwritten"):
        flushes.records()
    assert file.counts().ended == RING + 1


def test_a_record_that_was_never_filled_in(
    flushes: Shim, file: WatchedFile, path: Path, driver: Driver
) -> None:
    """As after a QEMU that was killed at that moment."""
    driver.call(Operation.FSYNC, path)
    flushes._page.begun += 1
    assert [record.number for record in flushes.records()] == [0]
    assert file.counts().begun == 1


def test_a_failed_wait_prints_the_counts(file: WatchedFile, path: Path, driver: Driver) -> None:
    file.fail(errno.EIO, nth=1)
    driver.call(Operation.FDATASYNC, path, calls=2)
    assert file.wait_ended(2, 0).failed == 1
    with pytest.raises(ContractError, match=r"dimm: 3 flushes should have begun within 0.01 s: 2 "):
        file.wait_begun(3, 0.01)
    with pytest.raises(
        ContractError, match=r"1 fsync calls should have ended .* 0 have begun, 0 en"
    ):
        file.wait_ended(1, 0, Operation.FSYNC)


@pytest.mark.parametrize("variable", [None, "", "x", "-1", "1", "1x", "999", "99999999999999"])
def test_inert_without_a_page(
    library: Path, program: Path, path: Path, variable: str | None
) -> None:
    words = [] if variable is None else [f"PAPRSCM_SHIM={variable}"]
    driver = Driver("env", f"LD_PRELOAD={library}", *words, program)
    for operation in OPERATIONS:
        assert driver.call(operation, path) == [0]
    assert driver.real() == [1] * 4
    # Its standard output is not a page, and stays open.
    assert driver.shell("echo $PAPRSCM_SHIM") == [""]
    driver.end()


def test_inert_with_a_file_that_is_not_a_page(library: Path, program: Path, path: Path) -> None:
    with path.open("r+") as file:
        os.truncate(path, 0)
        variables = (f"LD_PRELOAD={library}", f"PAPRSCM_SHIM={file.fileno()}")
        driver = Driver("env", *variables, program, pass_fds=(file.fileno(),))
        assert driver.call(Operation.FSYNC, path) == [0]
        driver.end()


def test_inert_with_a_page_without_our_magic(flushes: Shim, program: Path, path: Path) -> None:
    (handle,) = flushes.pass_fds
    file = flushes.watch(path)
    file.fail(errno.EIO)
    os.pwrite(handle, b"x", 0)
    driver = Driver(*flushes.prefix(), program, pass_fds=flushes.pass_fds)
    assert driver.call(Operation.FDATASYNC, path) == [0]
    driver.end()
    with pytest.raises(CapabilityError, match="did not load the flush shim within 0 s"):
        flushes.require_loaded(0)


def test_a_library_of_another_source_is_refused(flushes: Shim, program: Path, path: Path) -> None:
    (handle,) = flushes.pass_fds
    file = flushes.watch(path)
    file.fail(errno.EIO)
    # The digest of the layout follows the magic.
    os.pwrite(handle, b"x", 8)
    driver = Driver(*flushes.prefix(), program, pass_fds=flushes.pass_fds)
    with pytest.raises(HostError, match=r"does not match paprscm/vm/sync_shim\.py"):
        flushes.require_loaded()
    assert driver.call(Operation.FDATASYNC, path) == [0]
    driver.end()


def test_loaded_is_the_pid(flushes: Shim, program: Path) -> None:
    assert flushes.loaded is None
    with pytest.raises(CapabilityError, match=r"within 0\.01 s"):
        flushes.require_loaded(0.01)
    driver = Driver(*flushes.prefix(), program, pass_fds=flushes.pass_fds)
    assert flushes.require_loaded() == driver.process.pid == flushes.loaded
    driver.end()


def test_a_program_that_does_not_inherit_the_page(
    flushes: Shim, file: WatchedFile, path: Path, program: Path
) -> None:
    """Like a QEMU that replaces another one in its process (cpr-exec)."""
    driver = Driver(*flushes.prefix(inherits=False), program)
    assert flushes.require_loaded() == driver.process.pid
    file.fail(errno.EIO)
    assert driver.call(Operation.FDATASYNC, path) == [errno.EIO]
    driver.end()


def test_a_program_started_by_its_loader(flushes: Shim, file: WatchedFile, program: Path) -> None:
    """Like a fetched QEMU (paprscm/emulator/binary.py)."""
    with program.open("rb") as binary:
        section = ELFFile(binary).get_section_by_name(".interp")
        assert section is not None
        interpreter = section.data().rstrip(b"\0").decode()
    argv = [*flushes.prefix(), interpreter, "--library-path", str(program.parent), str(program)]
    driver = Driver(*argv, pass_fds=flushes.pass_fds)
    assert flushes.require_loaded() == driver.process.pid
    file.fail(errno.EIO)
    assert driver.call(Operation.FDATASYNC, file.path) == [errno.EIO]
    driver.end()


def test_built_once(cache: Cache, library: Path) -> None:
    before = library.stat()
    assert sync_shim.build(cache) == library
    assert library.stat() == before


def test_no_compiler(cache: Cache, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostError, match=r"cc is not installed \(apt install gcc"):
        sync_shim.build(cache)


def test_both_sides_have_the_same_layout(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, library: Path
) -> None:
    """Different layouts in C and Python fail at compile time."""
    assert library.exists()
    swapped = [(name, kind) for name, kind in shim_layout.RULE._fields_ if name != "hang_mask"]
    rule = shim_layout._struct(
        *((kind, name) for name, kind in swapped), (shim_layout._U32, "hang_mask")
    )
    monkeypatch.setattr(shim_layout, "RULE", rule)
    with pytest.raises(HostError, match="static assertion failed"):
        sync_shim.build(Cache(tmp_path))


@pytest.mark.parametrize("name", ["a b", "a:b", "$LIB", "a,b%s"])
def test_a_library_at_any_path(name: str, library: Path, program: Path, tmp_path: Path) -> None:
    folder = tmp_path / name
    folder.mkdir()
    copy = shutil.copy(library, folder)
    with Shim(Path(copy)) as flushes:
        driver = Driver(*flushes.prefix(), program, pass_fds=flushes.pass_fds)
        assert flushes.require_loaded() == driver.process.pid
        driver.end()


SANITIZED = """
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>
int main(int argc, char **argv)
{
	int fd = open(argv[argc - 1], O_RDWR);
	char *map = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);

	map[0] = 'x';
	return msync(map, 4096, MS_SYNC) || fdatasync(fd);
}
"""


def compiled(folder: Path, *flags: str) -> Path:
    (folder / "program.c").write_text(SANITIZED)
    argv = ["cc", *flags, "-o", str(folder / "program"), str(folder / "program.c")]
    if subprocess.run(argv, check=False, capture_output=True).returncode:
        pytest.skip(f"this compiler cannot do {' '.join(flags)}")
    return folder / "program"


@pytest.mark.parametrize("flag", ["-fsanitize=address", "-fsanitize=undefined", "-O2"])
def test_a_program_with_a_sanitizer(
    library: Path, path: Path, tmp_path: Path, flag: str, capfd: pytest.CaptureFixture[str]
) -> None:
    program = compiled(tmp_path, flag)
    before = sanitizers(program)
    assert [name.partition(".")[0] for name in before] == (["libasan"] if "addr" in flag else [])
    with Shim(library, before=before) as flushes:
        file = flushes.watch(path)
        argv = [*flushes.prefix(), str(program), str(path)]
        done = subprocess.run(argv, pass_fds=flushes.pass_fds, check=False)
        assert (done.returncode, capfd.readouterr().err) == (0, "")
        assert [r.operation for r in flushes.records()] == [Operation.MSYNC, Operation.FDATASYNC]
        assert file.is_mapped()
    if before:
        with Shim(library) as flushes:
            argv = [*flushes.prefix(), str(program), str(path)]
            subprocess.run(argv, pass_fds=flushes.pass_fds, check=False)
        assert "runtime does not come first" in capfd.readouterr().err, "the order does not matter"


@pytest.mark.parametrize("flag", ["-static", "-static-pie"])
def test_a_static_program_cannot_load_it(
    library: Path, path: Path, tmp_path: Path, flag: str
) -> None:
    program = compiled(tmp_path, flag)
    with pytest.raises(CapabilityError, match=r"program is static: .*\(set qemu= to a dynamic"):
        sanitizers(program)
    with Shim(library) as flushes:
        argv = [*flushes.prefix(), str(program), str(path)]
        subprocess.run(argv, pass_fds=flushes.pass_fds, check=True)
        with pytest.raises(CapabilityError, match="did not load"):
            flushes.require_loaded(0)


def test_a_script_that_starts_the_program(library: Path, path: Path, tmp_path: Path) -> None:
    """The shim is loaded into the script's shell, but not into the program."""
    script = tmp_path / "script"
    script.write_text(f'#!/bin/sh\nexec {compiled(tmp_path)} "$@"\n')
    script.chmod(0o755)
    with pytest.raises(CapabilityError, match="script is not an ELF program"):
        sanitizers(script)
    with Shim(library) as flushes:
        file = flushes.watch(path)
        argv = [*flushes.prefix(), str(script), str(path)]
        subprocess.run(argv, pass_fds=flushes.pass_fds, check=True)
        flushes.require_loaded(0)
        assert not file.is_mapped()


# H_SCM_FLUSH of the DIMM in slot 0, five times; each is polled until it is no longer busy. Then
# H_CEDE forever.
FLUSHES = """
	.globl	_start
_start:	li	%r20, 5
1:	li	%r5, 0
2:	li	%r3, 0x44c
	lis	%r4, 0x9000
	sc	1
	mr	%r5, %r4
	cmpdi	%r3, 9901
	beq	2b
	addic.	%r20, %r20, -1
	bne	1b
3:	li	%r3, 0xe0
	sc	1
	b	3b
"""
DIMM_BYTES = (256 << 20) + (128 << 10)


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tools = "powerpc64le-linux-gnu-"
    if shutil.which(tools + "ld") is None:
        pytest.skip("no binutils-powerpc64le-linux-gnu")
    folder = tmp_path_factory.mktemp("kernel")
    (folder / "flushes.S").write_text(FLUSHES)
    for words in (
        ["as", "-mbig", "-a64", "-mpower8", "-o", "flushes.o", "flushes.S"],
        ["ld", "-EB", "-m", "elf64ppc", "-Ttext", "0", "-o", "flushes", "flushes.o"],
    ):
        subprocess.run([tools + words[0], *words[1:]], cwd=folder, check=True)
    return folder / "flushes"


@pytest.mark.parametrize(
    ("pmem", "operation"), [("off", Operation.FDATASYNC), ("on", Operation.PMEM_PERSIST)]
)
def test_qemu_and_its_flushes(
    flushes: Shim,
    cache: Cache,
    kernel: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    pmem: str,
    operation: Operation,
) -> None:
    host = binary.resolve(Archive(cache), "auto")
    if pmem == "on" and not host.has_pmem:
        pytest.skip("this QEMU has no libpmem")
    dimm = tmp_path / "dimm"
    dimm.touch()
    os.truncate(dimm, DIMM_BYTES)
    file = flushes.watch(dimm)
    file.hang()
    if pmem == "off":
        file.fail(errno.EIO, nth=2)
    override = ",pmem-override=on" if pmem == "on" else ""
    off = ",".join(f"cap-{name}=broken" for name in ("cfpc", "sbbc", "ibs"))
    argv: list[str | Path] = [
        *flushes.prefix(),
        *host.argv_prefix,
        *("-nodefaults", "-display", "none", "-accel", "tcg", "-cpu", "POWER9"),
        *("-machine", f"pseries,x-vof=on,{off},cap-ccf-assist=off"),
        *("-m", "256M,slots=1,maxmem=1G", "-kernel", kernel),
        "-object",
        f"memory-backend-file,id=m0,share=on,mem-path={dimm},size={DIMM_BYTES},pmem={pmem}",
        "-device",
        f"spapr-nvdimm,id=n0,memdev=m0,slot=0,label-size=128K,uuid={uuid.uuid4()}{override}",
    ]
    process = Process(argv, pass_fds=flushes.pass_fds)
    try:
        assert flushes.require_loaded() == process.pid
        # The shim is mapped in QEMU, but not in its keeper.
        stat = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        assert "flush_shim" in Path(f"/proc/{process.pid}/maps").read_text()
        assert "flush_shim" not in Path(f"/proc/{stat[1]}/maps").read_text()
        file.wait_begun(1, 10)
        time.sleep(0.05)
        assert (file.counts().begun, file.counts().ended) == (1, 0)
        file.release()
        assert file.wait_ended(5, 20).begun == 5
    finally:
        process.kill()
    records = flushes.records()
    assert [record.operation for record in records] == [operation] * 5
    assert process.pid not in {record.thread for record in records}
    output = capfd.readouterr().err
    failed = 1 if pmem == "off" else 0
    assert output.count("Could not sync nvdimm to backend file: Input/output error") == failed, (
        output
    )
