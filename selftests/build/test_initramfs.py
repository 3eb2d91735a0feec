# SPDX-License-Identifier: GPL-2.0-or-later
"""Initramfs of a modular kernel: the needed modules, in an order that loads."""

from __future__ import annotations

import gzip
import stat
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from paprscm.build import initramfs
from paprscm.build.tcg_fixup import INSTRUCTIONS
from paprscm.build.vmlinux import MODULE, UNKNOWN, Kernel
from paprscm.errors import ConfigError

TOOLS = "powerpc64le-linux-gnu-"
RELEASE = "6.12.9-test"
# A PKCS#7 signature of 40 bytes, scripts/sign-file.c.
SIGNATURE = (
    b"S" * 40 + struct.pack(">BBBBB3xI", 0, 0, 2, 0, 0, 40) + b"~Module signature appended~\n"
)
LACKS_ALL = {i.name: False for i in INSTRUCTIONS}


def make_kernel(config: dict[str, str] | None = None, papr_scm: str = MODULE) -> Kernel:
    """A kernel with these options as modules."""
    return Kernel(
        path=Path("/k/vmlinux"),
        release=RELEASE,
        page_size=65536,
        config=config,
        papr_scm=papr_scm,
        has_symbols=True,
        size_bytes=1,
        load_bytes=1,
    )


def add_module(
    root: Path,
    name: str,
    depends: str = "",
    *,
    softdep: str = "",
    version: str = RELEASE,
    folder: str = RELEASE,
    suffix: str = ".ko",
) -> Path:
    """A module with one dcbstps in it."""
    place = root / "lib/modules" / folder / "kernel"
    place.mkdir(parents=True, exist_ok=True)
    fields = [f"depends={depends}", f"vermagic={version} SMP mod_unload "]
    fields += [f"softdep={softdep}"] if softdep else []
    source = place.parent / "code.S"
    source.write_text(
        '\t.section .modinfo,"a"\n'
        + "".join(f'\t.asciz "{field}"\n' for field in fields)
        + "\t.text\n\t.type f, @function\nf:\t.long 0x7cc020ac\n\tblr\n\t.size f, . - f\n"
    )
    target = place / f"{name}.ko"
    subprocess.run([TOOLS + "as", "-a64", "-mlittle", "-o", target, source], check=True)
    if suffix == ".ko.gz":
        packed = place / f"{name}.ko.gz"
        packed.write_bytes(gzip.compress(target.read_bytes()))
        target.unlink()
        return packed
    return target


def order(root: Path, wanted: Sequence[str]) -> list[str]:
    """Load order of the modules, for a kernel of RELEASE."""
    return initramfs.load_order(
        wanted, initramfs.find_modules(make_kernel(), root), release=RELEASE
    )


def read_cpio(data: bytes) -> dict[str, tuple[int, bytes]]:
    """Mode and content of each entry of a newc archive."""
    entries: dict[str, tuple[int, bytes]] = {}
    place = 0
    while True:
        assert data[place : place + 6] == b"070701"
        numbers = [int(data[place + 6 + 8 * i : place + 14 + 8 * i], 16) for i in range(13)]
        mode, size, length = numbers[1], numbers[6], numbers[11]
        name = data[place + 110 : place + 109 + length].decode()
        place = (place + 110 + length + 3) & ~3
        if name == "TRAILER!!!":
            return entries
        entries[name] = (mode, data[place : place + size])
        place = (place + size + 3) & ~3


def test_each_module_comes_after_its_dependencies(tmp_path: Path) -> None:
    add_module(tmp_path, "nd_pmem", "libnvdimm,nd_btt")
    add_module(tmp_path, "nd_btt", "libnvdimm")
    add_module(tmp_path, "libnvdimm")
    add_module(tmp_path, "xfs", softdep="pre: crc32c post: later")
    add_module(tmp_path, "crc32c_generic")
    add_module(tmp_path, "later")
    add_module(tmp_path, "not-wanted")
    names = order(tmp_path, ["xfs", "nd_pmem", "built_in"])
    assert names == ["crc32c_generic", "xfs", "libnvdimm", "nd_btt", "nd_pmem"]


def test_dashes_and_compression(tmp_path: Path) -> None:
    add_module(tmp_path, "dm-mod", suffix=".ko.gz")
    add_module(tmp_path, "virtio-rng", "rng-core")
    add_module(tmp_path, "rng-core")
    assert order(tmp_path, ["dm_mod", "virtio_rng"]) == ["dm_mod", "rng_core", "virtio_rng"]


def test_circular_dependency(tmp_path: Path) -> None:
    add_module(tmp_path, "a", "b")
    add_module(tmp_path, "b", "a")
    assert sorted(order(tmp_path, ["a"])) == ["a", "b"]


def test_modules_of_another_version(tmp_path: Path) -> None:
    add_module(tmp_path, "xfs", folder="6.1.0-other")
    with pytest.raises(ConfigError, match=f"are for 6.1.0-other, the kernel is {RELEASE}"):
        initramfs.find_modules(make_kernel(), tmp_path)


def test_module_of_another_version(tmp_path: Path) -> None:
    add_module(tmp_path, "xfs", version="6.12.8-test")
    with pytest.raises(ConfigError, match=f"built for 6.12.8-test, the kernel is {RELEASE}"):
        order(tmp_path, ["xfs"])


def test_no_modules_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not the INSTALL_MOD_PATH of modules_install"):
        initramfs.find_modules(make_kernel(), tmp_path)
    (tmp_path / "lib/modules").mkdir(parents=True)
    with pytest.raises(ConfigError, match="are for none, the kernel is"):
        initramfs.find_modules(make_kernel(), tmp_path)


@pytest.mark.parametrize("content", [b"", b"\x7fELF", b"text", b"\x1f\x8bgarbage"])
def test_damaged_module(tmp_path: Path, content: bytes) -> None:
    add_module(tmp_path, "xfs").write_bytes(content)
    with pytest.raises(ConfigError, match=r"xfs\.ko is (a damaged module|compressed and damaged)"):
        order(tmp_path, ["xfs"])


def test_initramfs_has_fixed_modules_and_init(tmp_path: Path) -> None:
    for name, depends in (("virtio_blk", ""), ("papr_scm", "libnvdimm"), ("libnvdimm", "")):
        add_module(tmp_path, name, depends)
    busybox = tmp_path / "busybox"
    busybox.write_bytes(b"static")
    archive = initramfs.build_initramfs(
        make_kernel({"PAPR_SCM": "m", "VIRTIO_BLK": "m"}),
        tmp_path,
        busybox,
        tmp_path / "initramfs",
        executes=LACKS_ALL,
    )
    assert archive.modules == ("virtio_blk", "libnvdimm", "papr_scm")
    assert archive.sites == 3
    entries = read_cpio(archive.path.read_bytes())
    listed = entries["modules/order"][1].decode().split()
    assert listed == ["00-virtio_blk.ko", "01-libnvdimm.ko", "02-papr_scm.ko"]
    for name in listed:
        content = entries[f"modules/{name}"][1]
        assert struct.pack("<I", 0x7C0020AC) in content
        assert struct.pack("<I", 0x7CC020AC) not in content
    assert entries["bin/busybox"] == (stat.S_IFREG | 0o755, b"static")
    assert entries["dev/console"][0] == stat.S_IFCHR | 0o600
    assert {name for name, (mode, _) in entries.items() if stat.S_ISDIR(mode)} == {
        *("bin", "dev", "modules", "proc", "root", "sys"),
    }
    (tmp_path / "init").write_bytes(entries["init"][1])
    subprocess.run(["sh", "-n", tmp_path / "init"], check=True)


def test_a_signature_is_kept(tmp_path: Path) -> None:
    """strip would remove it, and then a kernel with MODULE_SIG_FORCE refuses the module."""
    signed, plain = add_module(tmp_path, "virtio_blk"), add_module(tmp_path, "papr_scm")
    content = signed.read_bytes() + SIGNATURE
    signed.write_bytes(content)
    made = initramfs.build_initramfs(
        make_kernel({"PAPR_SCM": "m", "MODULE_SIG_FORCE": "y"}),
        tmp_path,
        plain,
        tmp_path / "initramfs",
        executes={},
    )
    entries = read_cpio(made.path.read_bytes())
    assert entries["modules/00-virtio_blk.ko"][1] == content
    assert len(entries["modules/01-papr_scm.ko"][1]) < plain.stat().st_size


def test_a_signature_that_a_fix_up_breaks(tmp_path: Path) -> None:
    signed = add_module(tmp_path, "papr_scm")
    signed.write_bytes(signed.read_bytes() + SIGNATURE)

    def build(**config: str) -> initramfs.Initramfs:
        one = make_kernel({"PAPR_SCM": "m", **config})
        return initramfs.build_initramfs(
            one, tmp_path, signed, tmp_path / "initramfs", executes=LACKS_ALL
        )

    with pytest.raises(
        ConfigError, match=r"papr_scm\.ko .* loses its signature.*SIG_FORCE"
    ) as caught:
        build(MODULE_SIG_FORCE="y")
    assert "build papr_scm in" in str(caught.value.hint)
    assert build().sites == 1


def test_configuration_from_the_module_configs(tmp_path: Path) -> None:
    unknown = make_kernel(None, UNKNOWN)
    add_module(tmp_path, "papr_scm")
    assert initramfs.with_config(unknown, tmp_path) == unknown
    config = gzip.compress(b"CONFIG_PAPR_SCM=m\nCONFIG_PPC_4K_PAGES=y\nCONFIG_IKCONFIG=m\n")
    path = add_module(tmp_path, "configs")
    path.write_bytes(path.read_bytes() + b"IKCFG_ST" + config + b"IKCFG_ED")
    kernel = initramfs.with_config(unknown, tmp_path)
    assert (kernel.option("IKCONFIG"), kernel.option("XFS_FS")) == ("m", "n")
    assert (kernel.papr_scm, kernel.page_size) == (MODULE, 4096)


def test_a_missing_module_is_named(tmp_path: Path) -> None:
    add_module(tmp_path, "virtio_blk")
    target = tmp_path / "initramfs"
    for config, papr_scm in (({"PAPR_SCM": "m", "VIRTIO_BLK": "m"}, MODULE), (None, UNKNOWN)):
        with pytest.raises(ConfigError, match=r"lacks papr_scm, which the kernel .* as a module"):
            initramfs.build_initramfs(
                make_kernel(config, papr_scm), tmp_path, tmp_path, target, executes={}
            )
    assert not target.exists()


def test_archive_is_readable_and_padded(tmp_path: Path) -> None:
    target = tmp_path / "archive"
    for length in range(9):
        files = {"d/" + "n" * (length + 1): (stat.S_IFREG | 0o644, b"x" * length)}
        initramfs.write_cpio(target, files)
        data = target.read_bytes()
        assert len(data) % 4 == 0
        entries = read_cpio(data)
        assert entries["d/" + "n" * (length + 1)] == (stat.S_IFREG | 0o644, b"x" * length)
