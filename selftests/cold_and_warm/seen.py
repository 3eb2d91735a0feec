# SPDX-License-Identifier: GPL-2.0-or-later
"""State of a guest recorded by ten.py, and unexpected differences between two guests."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

# A plugged DIMM is not in the tree that the firmware made.
_TREE_MAY_DIFFER = (
    r".*/phandle",  # Numbered by the firmware, over all nodes present at boot.
    r".*/ibm,pmemory@[0-9a-f]{8}/name",  # ibm,configure-connector does not return it.
    r".*/ibm,pft-size",  # QEMU's choice, by the memory present at boot.
    r".*/linux,direct64-ddr-window-info",  # Linux maps all of pmem for DMA, if it has any.
)
_SYS_MAY_DIFFER = (
    r".*/of_node/(phandle|name)",  # As above.
    r".*/(stat|inflight|diskseq|dev)",  # Bytes read so far; numbers in the order of discovery.
    r".*/bdi/max_bytes",  # A part of the free memory.
    r".*/uuid",  # Random.
    r".*/uevent",  # Device numbers; the other values are in separate files.
)
_LOG_MAY_DIFFER = (
    r"virtio-pci .*: ibm,create-pe-dma-window\(2027\) .*",  # As above.
    r"pseries-pmem: Successfully added /ibm,persistent-memory/ibm,pmemory@.*",  # It was plugged.
    r"radix-mmu: Mapped .*",  # For single DIMMs, or for adjacent ones together.
    r"sh \([0-9]+\): drop_caches: 3",  # Before it was saved.
    r"Memory: [0-9]+K/.* available .*",  # Some KiB more or less are reserved from boot to boot.
    r"hrtimer: interrupt took [0-9]+ ns",  # The host was busy.
    # Caused by the recording itself, and only by the first file.
    r"bdi [0-9:]+: the stable_pages_required attribute has been removed.*",
    r"block pmem@.*: the capability attribute has been deprecated.",
)
_NAME = re.compile(r"\b(region|namespace|pfn|dax|btt|pmem|ndbus|nmem)([0-9]+)(?=\b|s\b|\.|p)")
_CLAIM = re.compile(r"\b(pfn|dax|btt)([0-9]+)\.([0-9]+)\b")
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


class Seen:
    """State of one guest, with device numbers replaced by the DRC of the DIMM.

    Args:
        file: written by ten.py.
    """

    def __init__(self, file: Path) -> None:
        text = file.read_bytes().decode(errors="replace")
        self._drcs: dict[str, str] = {}
        # Devices that hold a namespace, and empty ones for the next namespace, are registered
        # asynchronously: their numbers depend on which is first.
        self._holders = set(re.findall(r"/holder <==\n(?:sys )?(\w+\.[0-9]+)$", text, re.MULTILINE))
        self.tree: dict[str, str] = {}
        self.files: dict[str, str] = {}
        lines, log, name = [], [], None
        for line in text.splitlines():
            kind, _, rest = line.partition(" ")
            if kind == "of":
                device, _, node = rest.partition(" ")
                self._drcs[device] = node[-8:]
            elif kind == "tree":
                digest, _, path = rest.partition("  ")
                self.tree[path] = digest
            elif kind == "log":
                log.append(re.sub(r"^\[ *[0-9.]+\] ", "", rest))
            elif kind == "sys":
                lines.append(rest)
        for bus, nmem in re.findall(r"/(ndbus[0-9]+)/(nmem[0-9]+)/", text):
            self._drcs[nmem] = self._drcs[bus]
        for line in lines:
            if header := re.fullmatch("==> (.*) <==", line):
                name = self._named(header[1])
                self.files[name] = ""
            elif name is not None:
                self.files[name] += self._named(line) + "\n"
        self.log = Counter(_UUID.sub("UUID", self._named(line)) for line in log)

    def _named(self, text: str) -> str:
        def by_drc(match: re.Match[str]) -> str:
            # pmem0, namespace0 and pfn0 are of region0 (region_devs.c, namespace_devs.c).
            known = match[1] in ("ndbus", "nmem")
            owner = match[0] if known else f"region{match[2]}"
            return f"{match[1]}@{self._drcs.get(owner, match[2])}"

        def by_use(match: re.Match[str]) -> str:
            return f"{match[1]}{match[2]}." + ("used" if match[0] in self._holders else "empty")

        return _NAME.sub(by_drc, _CLAIM.sub(by_use, text))


def differences(first: Seen, second: Seen) -> list[str]:
    """Unexpected differences between two guests, one line each."""
    lines = []
    for title, one, other, may in (
        ("device tree", first.tree, second.tree, _TREE_MAY_DIFFER),
        ("sysfs", first.files, second.files, _SYS_MAY_DIFFER),
    ):
        for name in sorted(one.keys() | other.keys()):
            if one.get(name) != other.get(name) and not _matches(name, may):
                lines.append(f"{title}: {name}: {one.get(name)!r}, {other.get(name)!r}")
    for line in sorted(first.log.keys() | second.log.keys()):
        if first.log[line] != second.log[line] and not _matches(line, _LOG_MAY_DIFFER):
            lines.append(f"kernel: {line!r}: {first.log[line]} and {second.log[line]} times")
    return lines


def _matches(text: str, patterns: tuple[str, ...]) -> bool:
    return any(re.fullmatch(pattern, text) for pattern in patterns)
