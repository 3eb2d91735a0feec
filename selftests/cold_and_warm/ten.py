# SPDX-License-Identifier: GPL-2.0-or-later
"""Ten of the suite's tests; their guests also record the state of their machine.

selftests/guest/test_warm.py runs them, once with guests that boot and once with restored ones.
"""

from __future__ import annotations

from pathlib import Path

from test_map_sync import EachKind, NotDax, OneDimm, TwoDimms

from paprscm.guest.guest import Guest
from paprscm.testcase import PaprScmTest

# With few processes: each one takes 10 ms under TCG.
_LOOK = """
cd /sys/firmware/devicetree/base
find . -type f | sort | xargs sha256sum | sed 's/^/tree /'
cd /sys/bus/nd/devices 2>/dev/null && for name in *; do
	[ ! -e $name/of_node ] || echo "of $name $(readlink $name/of_node)"
done
find -L /sys/bus/nd/devices/*/ /sys/block/*/ -maxdepth 2 -type f | sort |
	xargs head -v -c 200 2>&1 | sed 's/^/sys /'
dmesg | sed 's/^/log /'
"""


class Looking(PaprScmTest):
    """A test that records the state of its guests when they end."""

    def boot(self, *arguments: object, **options: object) -> Guest:
        """Boot the same guest, and record its state before it ends."""
        guest = super().boot(*arguments, **options)  # type: ignore[arg-type]
        self.leave.callback(self.look, guest)
        return guest

    def look(self, guest: Guest) -> None:
        """Record the guest's device tree, sysfs files and kernel log."""
        seen = guest.succeed(_LOOK, timeout_s=120)
        (Path(self.outputdir) / "seen").write_text(seen)


class One(Looking, OneDimm):
    """
    :avocado: enable
    """

    def test_01_pmem_on_xfs(self) -> None:
        OneDimm.test_pmem_on_xfs(self)

    def test_02_pmem_on_ext4(self) -> None:
        OneDimm.test_pmem_on_ext4(self)

    def test_03_pmem_off_xfs(self) -> None:
        OneDimm.test_pmem_off_xfs(self)

    def test_04_pmem_off_ext4(self) -> None:
        OneDimm.test_pmem_off_ext4(self)

    def test_05_override_ext4(self) -> None:
        OneDimm.test_pmem_override_ext4(self)

    def test_06_plain_nvdimm_xfs(self) -> None:
        OneDimm.test_plain_nvdimm_xfs(self)


class Two(Looking, TwoDimms):
    """
    :avocado: enable
    """

    def test_07_pmem_on_first_xfs(self) -> None:
        TwoDimms.test_pmem_on_first_xfs(self)

    def test_08_pmem_off_first_ext4(self) -> None:
        TwoDimms.test_pmem_off_first_ext4(self)


class NoDimm(Looking, NotDax):
    """
    :avocado: enable
    """

    def test_09_tmpfs(self) -> None:
        NotDax.test_tmpfs(self)


class Plugged(Looking, EachKind):
    """
    :avocado: enable
    """

    def test_10_hotplug_ext4(self) -> None:
        EachKind.test_hotplug_ext4(self)
