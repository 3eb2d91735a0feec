# SPDX-License-Identifier: GPL-2.0-or-later
"""A real guest: its verbs, and its failures."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from paprscm.channel.command import TimedOutError
from paprscm.emulator.qmp import RefusedError
from paprscm.errors import ConfigError, ContractError, GuestLostError, HostError
from paprscm.guest.guest import Guest
from paprscm.vm.machine import Machine, Nvdimm

pytestmark = pytest.mark.guest

Boot = Callable[..., Guest]


def test_verbs(boot: Boot, tmp_path: Path) -> None:
    """All verbs in one boot: each result is only possible if the verb works."""
    guest = boot(Machine(nvdimms=(Nvdimm(slot=1),)))

    result = guest.run("echo out; echo err >&2; exit 3")
    assert (result.status, result.stdout, result.stderr) == (3, "out\n", "err\n")
    assert guest.succeed("cat", stdin=b"through\n") == "through"
    assert guest.run("sh -c 'kill -SEGV $$'").status == 128 + 11
    assert guest.fail("false").status == 1
    with pytest.raises(ContractError, match=r"(?s)`echo no; false`.*status 1.*no"):
        guest.succeed("echo no; false")
    with pytest.raises(ContractError, match="expected it to fail"):
        guest.fail("true")
    with pytest.raises(HostError, match="a program is missing"):
        guest.fail("no-such-program")
    with pytest.raises(HostError, match="crashed, SIGSEGV"):
        guest.succeed("sh -c 'kill -SEGV $$'")

    begun = time.monotonic()
    guest.run("(sleep 1; touch /tmp/there) > /dev/null 2>&1 &")
    assert guest.wait_until("test -e /tmp/there && echo yes", timeout_s=20) == "yes"
    assert time.monotonic() - begun < 20
    with pytest.raises(ContractError, match="still fails after 1 s"):
        guest.wait_until("test -e /nowhere", timeout_s=1)

    # More than an ssh window, with every byte value.
    data = os.urandom(1 << 20) + bytes(range(256)) * 16
    guest.put(data, "/run/a name", mode=0o600)
    assert guest.get("/run/a name") == data
    assert guest.succeed("stat -c %a '/run/a name'") == "600"
    # Both directions concurrently, more than either side buffers.
    assert guest.run("cat", stdin=data * 3).stdout_bytes == data * 3

    # The guest cannot reach the outside, not even a server on this host behind QEMU's gateway.
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        guest.fail(f"echo hello | timeout 2 busybox nc 10.0.2.2 {port}")
        server.settimeout(0.5)
        with pytest.raises(TimeoutError):
            server.accept()

    before = guest.qmp.execute("query-memory-devices")
    files = sorted(guest.file(1).parent.iterdir())
    for _ in range(2):
        with pytest.raises(RefusedError, match="invalid slot number 9"):
            guest.plug(Nvdimm(slot=9))
    assert guest.qmp.execute("query-memory-devices") == before
    assert sorted(guest.file(1).parent.iterdir()) == files
    assert guest.file(1).stat().st_size == Nvdimm().file_bytes

    log = (tmp_path / "guest" / "console.log").read_text()
    assert "Linux version" in log
    assert "paprscm: ready" in log
    assert (tmp_path / "guest" / "qemu.sh").stat().st_mode & 0o111
    assert guest.times.banner is not None
    assert guest.times.commands is not None
    assert 0 < guest.times.banner < guest.times.commands


def test_a_command_without_end_loses_the_guest(boot: Boot) -> None:
    guest = boot()
    with pytest.raises(TimedOutError, match=r"(?s)`echo begun; sleep 1000`.*within 1 s.*begun"):
        guest.run("echo begun; sleep 1000", timeout_s=1)
    with pytest.raises(GuestLostError, match="a command did not end within 1 s"):
        guest.run("true")


def test_a_kernel_warning_fails_the_running_command_within_seconds(boot: Boot) -> None:
    guest = boot()
    line = "WARNING: CPU: 0 PID: 1 at drivers/nvdimm/bus.c:1 f+0x1/0x2"
    begun = time.monotonic()
    with pytest.raises(ContractError, match=r"drivers/nvdimm/bus\.c:1"):
        guest.run(f"(sleep 0.5; echo '<1>{line}' > /dev/kmsg) & sleep 1000")
    assert time.monotonic() - begun < 10


def test_an_allowed_message_does_not(boot: Boot) -> None:
    guest = boot(allowed=["flush error: -5"])
    driver = "papr_scm ibm,persistent-memory:ibm,pmemory@90000000: flush error"
    guest.succeed(f"echo '<1>{driver}: -5' > /dev/kmsg; sleep 0.2")
    with guest.expect_messages("flush error: -1$"):
        guest.succeed(f"echo '<1>{driver}: -1' > /dev/kmsg")
    with pytest.raises(ContractError, match="flush error: -1"):
        guest.succeed(f"echo '<1>{driver}: -1' > /dev/kmsg; sleep 2")


def test_a_panic_is_an_event(boot: Boot) -> None:
    guest = boot()
    begun = time.monotonic()
    with pytest.raises(GuestLostError, match="Kernel panic - not syncing"):
        guest.run("echo c > /proc/sysrq-trigger; sleep 1000")
    assert time.monotonic() - begun < 15
    assert guest.process.wait(5) is not None, "QEMU still runs after a panic"


def test_a_kernel_without_a_root_disk_is_a_config_error(boot: Boot) -> None:
    with pytest.raises(ConfigError, match="has no root disk: Kernel panic") as caught:
        boot(Machine(cmdline=("root=/dev/vdz",)))
    assert "virtio_blk" in str(caught.value.hint)


def test_a_qemu_that_dies_is_an_event(boot: Boot) -> None:
    guest = boot()
    os.kill(guest.process.pid, 11)
    with pytest.raises(GuestLostError, match="QEMU ended, killed by SIGSEGV"):
        guest.run("sleep 1000")


def test_a_qemu_that_does_not_start_shows_its_output(boot: Boot) -> None:
    with pytest.raises(HostError, match=r"(?s)QEMU did not start.*exit status 1.*pmem-override"):
        boot(Machine(nvdimms=(Nvdimm(device="nvdimm", pmem_override=True),)))


def test_silence_is_a_hang(boot: Boot) -> None:
    """A guest that stops printing is lost after the silence limit, which the error names."""
    with pytest.raises(GuestLostError, match=r"(?s)printed nothing for 2 s.*silence_limit_s"):
        boot(Machine(cmdline=("init=/bin/cat",)), limits={"silence_limit_s": 2.0})


def test_killed_guests_keep_their_backing_files(boot: Boot) -> None:
    guest = boot(Machine(nvdimms=(Nvdimm(),)))
    guest.kill()
    assert guest.file(0).exists()
    with pytest.raises(GuestLostError, match="the guest was killed"):
        guest.run("true")


def test_the_script_next_to_the_logs_runs_the_same_machine(boot: Boot, tmp_path: Path) -> None:
    boot(Machine(nvdimms=(Nvdimm(),))).kill()
    script = (tmp_path / "guest" / "qemu.sh").read_text()
    dtb = tmp_path / "dtb"
    # The same command line, except that QEMU writes the device tree and exits.
    dumped = script.replace("x-vof=on", f"x-vof=on,dumpdtb={dtb}")
    subprocess.run(["sh", "-c", dumped], check=True, capture_output=True, timeout=30)
    assert b"ibm,pmemory@90000000" in dtb.read_bytes()
