# SPDX-License-Identifier: GPL-2.0-or-later
"""Evidence of the OOM killer: from the files that are readable, and quoted."""

from __future__ import annotations

import re
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from paprscm.host.oom import OomKills, evidence, read_oom_kills

MEMORY_EVENTS = "low 0\nhigh 0\nmax 3921\noom 4\noom_kill {}\noom_group_kill 0\n"
OOM_CONTROL = "oom_kill_disable 0\nunder_oom 0\noom_kill {}\n"
VMSTAT = "nr_free_pages 1\noom_kill {}\nnuma_hit 2\n"
# Linux 6.12: a record of /dev/kmsg is a line, with further lines for its dictionary.
KMSG = """6,1201,88100400,-;python3 invoked oom-killer: gfp_mask=0xcc0(GFP_KERNEL), order=0
 SUBSYSTEM=memory
3,1240,88100412,-;Memory cgroup out of memory: Killed process 731 (qemu-system-ppc) total-vm:9kB
3,1241,88100413,-;Memory cgroup out of memory: Killed process 7310 (cc1) total-vm:7kB
"""


def machine(root: Path, own: str, **files: str) -> Path:
    """Create a machine's /proc, /sys and /dev; the keys are paths with __ for a slash."""
    for name, text in {"proc__self__cgroup": own, **files}.items():
        file = root / name.replace("__", "/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


@pytest.mark.parametrize(
    ("own", "file", "text"),
    [
        (
            "0::/user.slice/a.scope\n",
            "sys/fs/cgroup/user.slice/a.scope/memory.events",
            MEMORY_EVENTS,
        ),
        # A container that sees the host's path, but its own cgroup as the root.
        ("0::/docker/1\n", "sys/fs/cgroup/memory.events", MEMORY_EVENTS),
        ("9:cpu:/\n4:memory:/a\n0::/\n", "sys/fs/cgroup/memory/a/memory.oom_control", OOM_CONTROL),
        ("4:hugetlb,memory:/a:b\n", "sys/fs/cgroup/memory/a:b/memory.oom_control", OOM_CONTROL),
        ("4:memory:/docker/1\n", "sys/fs/cgroup/memory/memory.oom_control", OOM_CONTROL),
        ("0::/\n", "proc/vmstat", VMSTAT),
        ("", "proc/vmstat", VMSTAT),
    ],
)
def test_a_rise_of_the_count_is_evidence(tmp_path: Path, own: str, file: str, text: str) -> None:
    root = machine(tmp_path, own, proc__vmstat=VMSTAT.format(77), **{file: text.format(3)})
    before = read_oom_kills(root)
    assert before == OomKills(root / file, 3)
    assert evidence(1, before, root) == (
        f"the OOM killer's count is still 3 ({root / file})",
        False,
    )
    (root / file).write_text(text.format(4))
    text_of_rise = f"the OOM killer's count rose from 3 to 4 ({root / file})"
    assert evidence(1, before, root) == (text_of_rise, True)


def test_the_kernel_s_message_about_the_process_is_quoted(tmp_path: Path) -> None:
    root = machine(tmp_path, "", dev__kmsg=KMSG)
    assert read_oom_kills(root) is None
    count = "the OOM killer's count cannot be read"
    words = "Memory cgroup out of memory: Killed process 731 (qemu-system-ppc) total-vm:9kB"
    assert evidence(731, None, root) == (f"{count}; kernel: {words}", True)
    assert evidence(73, None, root) == (count, False)


# Use memory until it is killed, and print the error of Process.
HOG = """
import os, sys
from pathlib import Path
from paprscm.errors import KilledError
from paprscm.host.process import Process
Path(sys.argv[1], "cgroup.procs").write_text(str(os.getpid()))
process = Process([sys.executable, "-c", "held = [b'x' * 2**20 for _ in range(2**20)]"])
try:
    process.wait()
except KilledError as error:
    print(error)
"""


@pytest.fixture
def small_cgroup() -> Iterator[Path]:
    """A memory cgroup of 64 MiB below the current one."""
    match = re.search(r"^\d+:memory:(.*)$", Path("/proc/self/cgroup").read_text(), re.MULTILINE)
    if match:
        own, limit = Path("/sys/fs/cgroup/memory" + match[1]), "memory.limit_in_bytes"
    else:
        unified = re.search(r"^0::(.*)$", Path("/proc/self/cgroup").read_text(), re.MULTILINE)
        own, limit = Path("/sys/fs/cgroup" + (unified[1] if unified else "")), "memory.max"
    group = own / f"paprscm-selftest-{uuid.uuid4().hex[:8]}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no memory cgroup can be made: {error}")
    try:
        try:
            (group / limit).write_text(str(64 << 20))
        except OSError as error:
            pytest.skip(f"no memory cgroup can be limited: {error}")
        yield group
    finally:
        group.rmdir()


def test_the_oom_killer_is_named_by_a_real_kill(small_cgroup: Path, tmp_path: Path) -> None:
    script = tmp_path / "hog.py"
    script.write_text(HOG)
    done = subprocess.run(
        [sys.executable, str(script), str(small_cgroup)],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert re.search(
        r"was killed by SIGKILL from outside: the OOM killer's count rose from 0 to 1 "
        rf"\({small_cgroup}/memory\.\w+\).*free memory, or run fewer tests",
        done.stdout,
    ), done.stdout
    print(done.stdout)  # noqa: T201
