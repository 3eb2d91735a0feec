# SPDX-License-Identifier: GPL-2.0-or-later
"""The command line is a pure function of the machine; invalid DIMMs are refused."""

from __future__ import annotations

import itertools
import shlex
import subprocess
from pathlib import Path

import pytest

from paprscm.emulator.binary import Qemu
from paprscm.errors import CapabilityError, ConfigError
from paprscm.vm.argv import Payload, Wiring, bare_argv, qemu_argv, script
from paprscm.vm.machine import GIB, MIB, Board, Machine, Nvdimm, require

PAYLOAD = Payload(kernel=Path("/k/vmlinux"), disk=Path("/d/disk"))
BOARD = Board()
WIRING = Wiring(console_fd=5, port_fd=7, agent_fd=8, console_log=Path("/o/console.log"))


def argv(machine: Machine, board: Board = BOARD, **files: str) -> list[str]:
    """The command line, with /s/N as the file of the DIMM in slot N."""
    named = {n.slot: Path(files.get(f"slot{n.slot}", f"/s/{n.slot}")) for n in machine.nvdimms}
    return qemu_argv(("qemu",), machine, board, PAYLOAD, named, WIRING)


def after(words: list[str], option: str) -> list[str]:
    """The values of every `option`."""
    return [value for word, value in itertools.pairwise(words) if word == option]


GOLDEN = """\
qemu
-machine pseries,x-vof=on,cap-cfpc=broken,cap-sbbc=broken,cap-ibs=broken,cap-ccf-assist=off
-accel tcg
-cpu POWER9
-smp 2
-m 1024M,slots=8,maxmem=7168M
-nodefaults
-display none
-no-reboot
-kernel /k/vmlinux
-append 'console=hvc0 root=/dev/vda ro init=/init \
ip=10.0.2.15::10.0.2.2:255.255.255.0::eth0:off panic=-1 norandmaps'
-blockdev driver=raw,node-name=root,read-only=on,file.driver=file,file.filename=/d/disk
-device virtio-blk-pci,drive=root,romfile=
-netdev user,id=net,restrict=on,hostfwd=tcp:127.0.0.1:0-:22
-device virtio-net-pci,netdev=net,romfile=
-device virtio-rng-pci
-device virtio-serial-pci
-chardev socket,id=console,fd=5,logfile=/o/console.log,logappend=on
-serial chardev:console
-chardev socket,id=port,fd=7
-chardev socket,id=agent,fd=8
-device virtserialport,chardev=port,name=paprscm
-device virtserialport,chardev=agent,name=paprscm.agent
-object memory-backend-file,id=mem0,mem-path=/s/0,size=537001984,share=on,pmem=on
-device spapr-nvdimm,id=nv0,memdev=mem0,slot=0,label-size=131072,\
uuid=26d5ee6d-1c48-5acf-9d2c-5b0cc3ce6c1c
-object memory-backend-file,id=mem3,mem-path=/s/3,size=537001984,share=on
-device spapr-nvdimm,id=nv3,memdev=mem3,slot=3,label-size=131072,\
uuid=26d5ee6d-1c48-5acf-9d2c-5b0cc3ce6c1d
"""


def test_golden_command_line() -> None:
    machine = Machine(
        nvdimms=(
            Nvdimm(pmem=True, uuid="26d5ee6d-1c48-5acf-9d2c-5b0cc3ce6c1c"),
            Nvdimm(slot=3, uuid="26d5ee6d-1c48-5acf-9d2c-5b0cc3ce6c1d"),
        )
    )
    assert argv(machine) == shlex.split(GOLDEN)


def test_a_bare_machine_has_its_dimms_and_nothing_else() -> None:
    words = bare_argv(("qemu",), Machine(nvdimms=(Nvdimm(),)), Board(), {0: Path("/s/0")})
    assert "-S" in words
    assert not {"-netdev", "-blockdev", "-append"} & set(words)
    assert [word.partition(",")[0] for word in after(words, "-device")] == ["spapr-nvdimm"]


def test_the_memory_of_a_bare_machine_can_be_a_shared_file() -> None:
    board = Board(memory_mib=256)
    words = bare_argv(("qemu",), Machine(), board, {}, program=Path("/p"), memory_fd=9)
    assert "-S" not in words
    assert after(words, "-machine")[0].endswith(",memory-backend=ram")
    assert after(words, "-object") == [
        f"memory-backend-file,id=ram,mem-path=/proc/self/fd/9,size={256 * MIB},share=on"
    ]


def test_a_missing_feature_of_qemu_is_a_missing_capability() -> None:
    """With a fake QEMU: Debian has none without libpmem for this host."""
    bare = Qemu(
        argv_prefix=("qemu",),
        path=Path("/q/qemu"),
        key="",
        version=(7, 2, 0),
        version_text="7.2.0",
        machine="pseries-7.2",
        machine_types=frozenset({"pseries-7.2"}),
        properties={"memory-backend-file": frozenset(), "spapr-nvdimm": frozenset()},
        has_kvm=False,
        has_netdev_user=True,
        cpu_models=frozenset(),
        qmp_commands=frozenset(),
        migration_capabilities=frozenset(),
    )
    require(bare, Nvdimm())
    with pytest.raises(CapabilityError, match=r"without libpmem.*debian:trixie"):
        require(bare, Nvdimm(pmem=True))
    with pytest.raises(CapabilityError, match="no pmem-override"):
        require(bare, Nvdimm(pmem_override=True))


def test_type_and_options_of_the_machine() -> None:
    machine = Machine(type="pseries-7.2", options=("aux-ram-share=on",))
    words = after(argv(machine, Board()), "-machine")[0].split(",")
    assert words[0] == "pseries-7.2"
    assert words[-1] == "aux-ram-share=on"


def test_slof_and_kvm_have_no_tcg_options() -> None:
    words = argv(Machine(), Board(firmware="slof", accel="kvm", cpu="host"))
    assert after(words, "-machine") == ["pseries"]
    assert after(words, "-accel") == ["kvm"]


def test_kernel_words_come_before_machine_words() -> None:
    payload = Payload(kernel=Path("/k"), disk=Path("/d"), words=("xmon=off",))
    words = qemu_argv(("qemu",), Machine(cmdline=("xmon=on",)), Board(), payload, {}, WIRING)
    assert after(words, "-append")[0].endswith(" panic=-1 norandmaps xmon=off xmon=on")


def test_with_modules_init_configures_the_network() -> None:
    payload = Payload(kernel=Path("/k"), disk=Path("/d"), initrd=Path("/i"))
    words = qemu_argv(("qemu",), Machine(), Board(), payload, {}, WIRING)
    assert after(words, "-initrd") == ["/i"]
    assert "ip=" not in after(words, "-append")[0]


def test_a_dimm_of_another_numa_node() -> None:
    words = argv(Machine(nvdimms=(Nvdimm(), Nvdimm(slot=1, node=1)), nodes=2))
    assert after(words, "-numa") == ["node,nodeid=0,memdev=node0", "node,nodeid=1"]
    assert f"memory-backend-ram,id=node0,size={1024 * MIB}" in after(words, "-object")
    nodes = [",node=1" in word for word in after(words, "-device") if "spapr-nvdimm" in word]
    assert nodes == [False, True]


def test_distances_of_numa_nodes() -> None:
    words = argv(Machine(nodes=3, distances=((0, 1, 20), (0, 2, 80))))
    assert after(words, "-numa")[3:] == ["dist,src=0,dst=1,val=20", "dist,src=0,dst=2,val=80"]


def test_room_for_a_large_dimm_that_is_plugged_later() -> None:
    usual = Machine(nvdimms=(Nvdimm(),)).dimm_room_bytes
    assert Machine(nvdimms=(Nvdimm(),), room_bytes=MIB).dimm_room_bytes == usual
    large = Machine(nvdimms=(Nvdimm(),), room_bytes=40 * GIB).dimm_room_bytes
    assert large == 40 * GIB + Nvdimm().size_bytes


def test_a_second_disk_is_the_second_device_and_writable() -> None:
    words = argv(Machine(disk=Path("/d/two, three")))
    assert [word for word in after(words, "-device") if "blk" in word] == [
        "virtio-blk-pci,drive=root,romfile=",
        "virtio-blk-pci,drive=second,romfile=",
    ]
    (root, second) = after(words, "-blockdev")
    assert "node-name=root,read-only=on" in root
    assert "node-name=second,read-only=off" in second
    assert second.endswith("file.filename=/d/two,, three")


def test_devices_behind_the_iommu() -> None:
    machine = Machine(iommu=True, disk=Path("/d/two"))
    devices = [word for word in after(argv(machine), "-device") if "-pci" in word]
    assert [word.partition(",")[0].split("-")[1] for word in devices] == [
        *("blk", "blk", "net", "rng", "serial")
    ]
    assert all(word.endswith(",disable-legacy=on,iommu_platform=on") for word in devices)
    assert not any("iommu" in word for word in argv(Machine()))


def test_a_guest_that_boots_can_be_stopped_before() -> None:
    words = qemu_argv(("qemu",), Machine(), Board(), PAYLOAD, {}, WIRING, stopped=True)
    assert words == [*argv(Machine()), "-S"]


def test_a_machine_has_its_own_firmware() -> None:
    machine = Machine(firmware="slof")
    assert machine.board(Board()) == Board(firmware="slof")
    assert Machine().board(Board(firmware="slof")).firmware == "slof"


def test_override_unarmed_and_private_are_passed_on() -> None:
    nvdimm = Nvdimm(pmem=True, pmem_override=True, unarmed=True, share=False)
    words = argv(Machine(nvdimms=(nvdimm,)))
    assert "pmem-override=on,unarmed=on" in after(words, "-device")[-1]
    assert ",share=off,pmem=on" in after(words, "-object")[-1]


def test_pmem_off_has_no_pmem_property() -> None:
    # A QEMU without libpmem has neither property.
    words = " ".join(argv(Machine(nvdimms=(Nvdimm(),))))
    assert "pmem=" not in words
    assert "pmem-override" not in words


def test_commas_in_paths_survive() -> None:
    words = argv(Machine(nvdimms=(Nvdimm(),)), slot0="/s/a,b")
    assert "mem-path=/s/a,,b," in after(words, "-object")[-1]


def test_uuids_differ_by_slot_and_are_the_same_every_time() -> None:
    assert Nvdimm(slot=1).guid == Nvdimm(slot=1).guid != Nvdimm(slot=2).guid


def test_hotplug_has_the_same_properties_as_the_command_line() -> None:
    nvdimm = Nvdimm(slot=2, pmem=True)
    words = after(argv(Machine(nvdimms=(nvdimm,))), "-device")[-1].split(",")[1:]
    properties = dict(word.split("=", 1) for word in words)
    assert properties == {k: str(v) for k, v in nvdimm.frontend().items() if k != "driver"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size_bytes": 300 * MIB}, "256M or 512M; a file of 268566528 or 537001984 bytes"),
        ({"size_bytes": 0}, "not a multiple of 256 MiB"),
        ({"label_bytes": 65536}, "at least 131072"),
        ({"slot": 32}, "slot 32 is out of range"),
        ({"uuid": "xyz"}, "'xyz' is not a uuid"),
        ({"holds": "xfs", "share": False}, "needs a new backing file that the guest writes to"),
        ({"holds": "xfs", "read_only": True}, "needs a new backing file"),
        ({"holds": "xfs", "file": Path("/f")}, "needs a new backing file"),
        ({"device": "pc-dimm"}, "one of spapr-nvdimm, nvdimm"),
        ({"file": Path("/nonexistent")}, "backing file /nonexistent: No such file"),
    ],
)
def test_bad_dimms_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Nvdimm(**arguments)  # type: ignore[arg-type]
    assert message in str(caught.value)


def test_a_file_of_the_wrong_size_is_refused_with_the_right_one(tmp_path: Path) -> None:
    file = tmp_path / "backing"
    file.write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"has 1 bytes.*truncate -s 537001984"):
        Nvdimm(file=file)


def test_two_dimms_in_one_slot_are_refused() -> None:
    with pytest.raises(ConfigError, match="two DIMMs have slot 1"):
        Machine(nvdimms=(Nvdimm(slot=1), Nvdimm(slot=1)))


def test_script_runs_and_creates_missing_files(tmp_path: Path) -> None:
    backing = tmp_path / "a dir" / "backing"
    text = script(["echo", "-append", "two words"], [Nvdimm()], {0: backing})
    done = subprocess.run(["sh", "-c", text], capture_output=True, text=True, check=True)
    assert done.stdout == "-append two words\n"
    assert backing.stat().st_size == Nvdimm().file_bytes
