# SPDX-License-Identifier: GPL-2.0-or-later
"""tools/setup prepares a new machine, and does nothing on a prepared one."""

from __future__ import annotations

import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from paprscm.paths import ROOT

# Distributions, and the commands of Debian's essential packages, which setup may use.
DEBIAN = 'PRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\nID=debian\n'
FEDORA = 'NAME="Fedora Linux"\nID=fedora\nPRETTY_NAME="Fedora Linux 43 (Workstation Edition)"\n'
ROCKY = 'ID="rocky"\nID_LIKE="rhel centos fedora"\nPRETTY_NAME="Rocky Linux 9.5"\n'
UBUNTU = 'PRETTY_NAME="Ubuntu 24.04.2 LTS"\nID=ubuntu\nID_LIKE=debian\n'
ARCH = 'PRETTY_NAME="Arch Linux"\nID=arch\n'
ESSENTIAL = ("cat", "dirname", "env", "flock", "mkdir", "mv", "rm", "sh", "sha256sum", "sleep")

PYTHON = """\
echo "python $*" >> "$LOG"
case "$1 $2" in
"-c "*) [ "${TOO_OLD:-}" = "" ] ;;
"-V ") echo "Python ${VERSION:-3.11.9}" ;;
"-m venv")
	rm -rf .venv
	mkdir -p .venv/bin
	cat "$0" > .venv/bin/python
	chmod +x .venv/bin/python ;;
"-m pip")
	sleep "${PIP_TAKES:-0}"
	exit "${PIP_STATUS:-0}" ;;
esac
"""

APT = """\
echo "apt-get $*, $DEBIAN_FRONTEND" >> "$LOG"
case " $* " in
*" install "*)
	printf '#!/bin/sh\\n' > "$TOOLS/thing"
	chmod +x "$TOOLS/thing" ;;
esac
"""


class Machine:
    """A checkout, and a PATH with the machine's commands."""

    def __init__(self, folder: Path) -> None:
        self.checkout = folder / "checkout"
        (self.checkout / "tools").mkdir(parents=True)
        (self.checkout / "images").mkdir()
        shutil.copy(ROOT / "tools/setup", self.checkout / "tools/setup")
        (self.checkout / "pyproject.toml").write_text("[project]\n")
        self.packages("")
        self.tools = folder / "bin"
        self.tools.mkdir()
        self.log = folder / "log"
        for name in (*ESSENTIAL, "chmod"):
            path = shutil.which(name)
            assert path, name
            (self.tools / name).symlink_to(path)
        self.tool("python3", PYTHON)
        self.user(0)
        self.os_release = folder / "os-release"
        self.os_release.write_text(DEBIAN)

    def packages(self, lines: str) -> None:
        head = "# a comment\n\npython3-venv  module:ensurepip  python3  # why\n"
        (self.checkout / "images/host-packages").write_text(head + lines)

    def tool(self, name: str, script: str) -> None:
        path = self.tools / name
        path.write_text("#!/bin/sh\n" + script)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def user(self, uid: int) -> None:
        self.tool("id", f"echo {uid}\n")

    def start(self, **env: str) -> subprocess.Popen[str]:
        environment = {
            "PATH": str(self.tools),
            "LOG": str(self.log),
            "TOOLS": str(self.tools),
            "PYTHON": "python3",
            "OS_RELEASE": str(self.os_release),
            **env,
        }
        argv = [self.checkout / "tools/setup"]
        return subprocess.Popen(
            argv, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def run(self, status: int = 0, **env: str) -> str:
        """Run setup, which must end with `status`; return its output."""
        self.log.write_text("")
        process = self.start(**env)
        out, output = process.communicate(timeout=30)
        assert process.returncode == status, output
        assert out == "", "setup prints only on stderr"
        return output

    def called(self, word: str) -> list[str]:
        """Commands of the last run that contain `word`."""
        return [line for line in self.log.read_text().splitlines() if word in line]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_second_run_does_and_prints_nothing(machine: Machine) -> None:
    assert "making .venv" in machine.run()
    assert machine.called("venv --clear")
    assert machine.called("pip install")
    assert machine.run() == ""
    assert not machine.called("-m")


def test_missing_packages_are_named_and_installed(machine: Machine) -> None:
    machine.packages("the-thing thing # why\nthere sh # why\nfile /nonexistent/file # why\n")
    machine.tool("apt-get", APT)
    output = machine.run(1)
    assert "setup: missing packages: the-thing file\n" in output
    # One of the two packages is installed now, the other stays missing.
    assert "still missing after their installation: file" in output
    update, install = machine.called("apt-get")
    assert " update, noninteractive" in update
    assert " -y --no-install-recommends install the-thing file, noninteractive" in install
    machine.packages("the-thing thing # why\n")
    machine.run()
    assert not machine.called("apt-get")


def test_user_without_sudo_gets_the_line(machine: Machine) -> None:
    machine.packages("the-thing thing # why\n")
    machine.tool("apt-get", APT)
    machine.user(1000)
    output = machine.run(1)
    assert "run as root: apt-get install -y --no-install-recommends the-thing\n" in output
    assert not machine.called("apt-get")


def test_user_with_sudo_uses_it(machine: Machine) -> None:
    machine.packages("the-thing thing # why\n")
    machine.tool("apt-get", APT)
    machine.tool("sudo", 'echo "sudo $*" >> "$LOG"; exec "$@"\n')
    machine.user(1000)
    machine.run()
    assert len(machine.called("sudo env DEBIAN_FRONTEND=noninteractive apt-get")) == 2


def test_debian_without_apt(machine: Machine) -> None:
    machine.packages("the-thing thing # why\n")
    output = machine.run(1)
    assert "missing packages: the-thing" in output
    assert "no apt-get here; run as root: apt-get install" in output


LIST = "the-thing thing # makes things\nlib /gone/x.h lib-devel # why\ncross /gone/y.h - # also\n"


@pytest.mark.parametrize("release", [FEDORA, ROCKY])
def test_fedora(machine: Machine, release: str) -> None:
    machine.packages(LIST)
    machine.os_release.write_text(release)
    # Fedora has apt-get, which the suite needs, but which cannot install packages there.
    machine.tool("apt-get", APT)
    output = machine.run(1)
    assert "  thing: makes things (Debian and Ubuntu: the-thing, Fedora: the-thing)\n" in output
    assert "  /gone/x.h: why (Debian and Ubuntu: lib, Fedora: lib-devel)\n" in output
    assert output.endswith("run as root: dnf install the-thing lib-devel\n")
    assert not machine.called("apt-get")
    machine.packages("cross /gone/y.h - # it runs without\n")
    machine.run()


def test_other_systems(machine: Machine) -> None:
    machine.packages(LIST)
    machine.tool("apt-get", APT)
    machine.os_release.write_text(ARCH)
    output = machine.run(1)
    assert "setup: Arch Linux lacks these tools:\n  thing: makes things (Debian and" in output
    assert "  /gone/y.h: also (Debian and Ubuntu: cross, Fedora has none)\n" in output
    assert output.endswith("install them, and run it again\n")
    machine.os_release.unlink()
    assert "this system lacks these tools" in machine.run(1)
    assert not machine.called("apt-get")


def test_ubuntu_is_like_debian(machine: Machine) -> None:
    machine.packages("the-thing thing # why\n")
    machine.tool("apt-get", APT)
    machine.os_release.write_text(UBUNTU)
    machine.run()
    assert len(machine.called("apt-get")) == 2


def test_no_fitting_python_asks_for_the_package(machine: Machine) -> None:
    machine.tool("apt-get", APT)
    output = machine.run(1, TOO_OLD="yes", PYTHON="python3", VERSION="3.15.0")
    assert "python3 is Python 3.15.0: the suite needs 3.11 to 3.14" in output
    assert "missing packages: python3-venv" in output
    output = machine.run(1, TOO_OLD="yes", PYTHON="python3", VERSION="3.14.1")
    assert "python3 is Python 3.14.1, without venv" in output


def test_newer_python_together_with_a_usable_one(machine: Machine) -> None:
    machine.tool("python3.12", PYTHON)
    machine.tool("python3", f"TOO_OLD=yes VERSION=3.15.0\n{PYTHON}")
    assert "making .venv with Python 3.12.3 (python3.12)" in machine.run(
        VERSION="3.12.3", PYTHON=""
    )


def test_checkout_below_a_colon(machine: Machine, tmp_path: Path) -> None:
    machine.checkout = machine.checkout.rename(tmp_path / "a:b")
    assert "below a path with a colon; move the checkout" in machine.run(1)


def test_checkout_with_odd_name(machine: Machine, tmp_path: Path) -> None:
    machine.checkout = machine.checkout.rename(tmp_path / "a b,c%d'e")
    machine.run()
    assert machine.run() == ""


def test_environment_made_by_hand_is_kept(machine: Machine) -> None:
    machine.run()
    (machine.checkout / ".venv/setup-stamp").unlink()
    machine.run()
    assert machine.called("pip install")
    assert not machine.called("venv --clear")
    assert machine.run() == ""


@pytest.mark.parametrize("way", ["pip fails", "killed"])
def test_interrupted_installation_is_done_again(machine: Machine, way: str) -> None:
    if way == "pip fails":
        assert "failed" in machine.run(1, PIP_STATUS="1")
    else:
        process = machine.start(PIP_TAKES="1")
        assert process.stderr
        while "installing" not in process.stderr.readline():
            pass
        process.kill()
        process.wait()
        process.stderr.close()
        assert process.stdout
        process.stdout.close()
    machine.run()
    assert machine.called("venv --clear")
    assert machine.called("pip install")
    assert machine.run() == ""


def test_changed_dependencies_are_installed_into_the_same_environment(machine: Machine) -> None:
    machine.run()
    (machine.checkout / "pyproject.toml").write_text("[project]\n# more\n")
    machine.run()
    assert machine.called("pip install")
    assert not machine.called("venv --clear")


def test_other_python_makes_a_new_environment(machine: Machine) -> None:
    machine.run()
    machine.run(VERSION="3.12.1")
    assert machine.called("venv --clear")


def test_moved_checkout_makes_a_new_environment(machine: Machine, tmp_path: Path) -> None:
    machine.run()
    machine.checkout = machine.checkout.rename(tmp_path / "elsewhere")
    machine.run()
    assert machine.called("venv --clear")


def test_two_concurrent_runs(machine: Machine) -> None:
    first = machine.start(PIP_TAKES="1")
    assert first.stderr
    assert "making" in first.stderr.readline()
    second = machine.start()
    output = second.communicate(timeout=30)[1]
    first.communicate(timeout=30)
    assert (first.returncode, second.returncode) == (0, 0)
    assert "another run is installing; waiting" in output
    assert len(machine.called("pip install")) == 1


def test_list_of_this_project_is_read(machine: Machine) -> None:
    shutil.copy(ROOT / "images/host-packages", machine.checkout / "images/host-packages")
    output = machine.run(1)
    assert "qemu-system-ppc gcc-powerpc64le-linux-gnu" in output
    assert "python3-venv" not in output
