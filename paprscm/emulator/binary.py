# SPDX-License-Identifier: GPL-2.0-or-later
"""One QEMU binary: locate or fetch it, and read its capabilities."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from elftools.common.exceptions import ELFError
from elftools.elf.elffile import ELFFile
from elftools.elf.segments import InterpSegment

from paprscm import log
from paprscm.debian.packages import Archive
from paprscm.emulator.capabilities import BINARY, FORMAT, GUEST_TYPES, JSON, QUERIED_TYPES, ask
from paprscm.errors import CapabilityError, ConfigError, HostError
from paprscm.host.cache import Cache
from paprscm.host.folders import require_loader
from paprscm.results import record
from paprscm.settings import expanded

INSTALL_HINT = "apt install qemu-system-ppc, or set qemu=debian:trixie to fetch one without root"
_FETCH_HINT = "qemu=debian:trixie fetches one that has it"

_FETCHED_FORMAT = "1"
"""Version of the layout of a fetched QEMU; part of its cache key."""
_NEEDS_BYTES = 600_000_000
_SUITES = ("bookworm", "trixie", "sid")
"""Debian suites whose QEMU local() looks for."""
_DEBIAN_ARCH = {"x86_64": "amd64", "aarch64": "arm64", "ppc64le": "ppc64el"}
KVM_API_VERSION = 12
"""The only value that KVM_GET_API_VERSION returns (Linux Documentation/virt/kvm/api.rst, 4.1)."""


@dataclass(frozen=True)
class Qemu:
    """One QEMU for pseries machines and the capabilities that it reports.

    Attributes:
        argv_prefix: command-line words before a machine's arguments.
        path: the binary.
        key: digest of the binary's identity.
        version: major, minor, micro.
        version_text: the version with the distribution's package version.
        machine: the machine type behind the alias "pseries".
        machine_types: names of all machine types.
        properties: names of properties by type, for "machine" (pseries) and each of
            capabilities.QUERIED_TYPES that this QEMU knows.
        has_kvm: built with KVM for its target.
        has_netdev_user: built with libslirp, the guests' network (-netdev user).
        cpu_models: values of -cpu.
        qmp_commands: QMP commands.
        migration_capabilities: capabilities for migrate-set-capabilities.
    """

    argv_prefix: tuple[str, ...]
    path: Path
    key: str
    version: tuple[int, int, int]
    version_text: str
    machine: str
    machine_types: frozenset[str] = field(repr=False)
    properties: Mapping[str, frozenset[str]] = field(hash=False, repr=False)
    has_kvm: bool
    has_netdev_user: bool
    cpu_models: frozenset[str] = field(repr=False)
    qmp_commands: frozenset[str] = field(repr=False)
    migration_capabilities: frozenset[str] = field(repr=False)

    def has(self, type_name: str, property_name: str | None = None) -> bool:
        """Return True if the QEMU has the type, and the type has the property.

        Raises:
            KeyError: the type is not one of capabilities.QUERIED_TYPES.
        """
        if type_name != "machine" and type_name not in QUERIED_TYPES:
            raise KeyError(type_name)
        names = self.properties.get(type_name)
        return names is not None and (property_name is None or property_name in names)

    @property
    def pseries_types(self) -> list[str]:
        """Versioned pseries machine types, from the oldest to the newest."""
        names = (re.fullmatch(r"pseries-(\d+)\.(\d+)", name) for name in self.machine_types)
        versions = sorted((int(name[1]), int(name[2])) for name in names if name)
        return [f"pseries-{major}.{minor}" for major, minor in versions]

    @property
    def has_vof(self) -> bool:
        """The pseries machine can boot without SLOF (x-vof=on)."""
        return self.has("machine", "x-vof")

    @property
    def has_pmem(self) -> bool:
        """Built with libpmem, which pmem=on needs."""
        return self.has("memory-backend-file", "pmem")

    @property
    def has_pmem_override(self) -> bool:
        """A spapr-nvdimm can ask for flushes although its backend is pmem=on."""
        return self.has("spapr-nvdimm", "pmem-override")

    @property
    def missing_for_guests(self) -> tuple[str, ...]:
        """Devices and backends that every guest needs and this QEMU lacks."""
        missing = tuple(name for name in GUEST_TYPES if not self.has(name))
        return missing if self.has_netdev_user else (*missing, "-netdev user (libslirp)")


def resolve(archive: Archive, setting: str) -> Qemu:
    """Find or fetch the QEMU that the setting names, and read its capabilities.

    Args:
        archive: source of fetched QEMUs; its cache keeps them and the capabilities of binaries.
        setting: 'auto' (the host's), 'debian:SUITE', or a path.

    Raises:
        ConfigError: no such file, not executable, not a QEMU, or one for another target.
        HostError: the QEMU is not installed, cannot be fetched, or does not start.
        CapabilityError: the QEMU has no spapr-nvdimm device.
    """
    cache = archive.cache
    argv_prefix, path = _locate(archive, setting)
    key = _binary_key(cache, path)
    facts = _remember(cache, key, f"capabilities-{FORMAT}", lambda: ask(argv_prefix, path))
    qemu = _from_facts(facts, argv_prefix, path, key)
    if not qemu.has("spapr-nvdimm"):
        # QEMU commit 8601b4f11d47 (in v7.0).
        fix = "it needs QEMU 7.0" if qemu.version < (7, 0, 0) else "build it with CONFIG_NVDIMM"
        raise CapabilityError(
            f"{path} (version {qemu.version_text}) has no spapr-nvdimm device",
            hint=f"{fix}; {_FETCH_HINT}",
        )
    return qemu


def require_guests(qemu: Qemu) -> None:
    """Raise unless the QEMU can run the guests of this suite.

    Raises:
        CapabilityError: it was built without some of their devices; the message names them.
    """
    if missing := qemu.missing_for_guests:
        raise CapabilityError(
            f"{qemu.path} (version {qemu.version_text}) cannot run the suite's guests: "
            f"it is built without {', '.join(missing)}",
            hint=f"configure it with --enable-slirp and its default devices; {_FETCH_HINT}",
        )


def remember(cache: Cache, qemu: Qemu, name: str, compute: Callable[[], JSON]) -> JSON:
    """Return a fact about this binary from the cache; compute it if it is absent.

    Args:
        cache: keeps the fact.
        qemu: the binary.
        name: name and format version of the fact.
        compute: returns the fact, as a JSON value; other runs wait for it.
    """
    return _remember(cache, qemu.key, name, compute)


def recorded(cache: Cache, qemu: Qemu, setting: str) -> record.Qemu:
    """The QEMU in the record of a job.

    Args:
        cache: keeps the binary's digest.
        qemu: the binary.
        setting: where it came from, as for resolve().
    """

    def digest() -> str:
        with qemu.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    return record.Qemu(
        version=qemu.version_text,
        path=str(qemu.path),
        setting=setting,
        sha256=str(remember(cache, qemu, "sha256", digest)),
        libpmem=qemu.has_pmem,
    )


def accel(
    setting: str, qemu: Qemu, *, host: str | None = None, device: Path = Path("/dev/kvm")
) -> str:
    """Return the accelerator to use, "tcg" or "kvm"; see `accel_and_reason`."""
    return accel_and_reason(setting, qemu, host=host, device=device)[0]


def accel_and_reason(
    setting: str, qemu: Qemu, *, host: str | None = None, device: Path = Path("/dev/kvm")
) -> tuple[str, str | None]:
    """Return the accelerator to use, "tcg" or "kvm", and for "tcg" the reason.

    Args:
        setting: 'auto', 'tcg' or 'kvm'.
        qemu: the binary.
        host: machine name as reported by uname; None: this host's.
        device: KVM's device node.

    Raises:
        CapabilityError: KVM was requested and is not available.
    """
    if setting == "tcg":
        return "tcg", "accel=tcg is set"
    reason = _why_no_kvm(qemu, host or platform.machine(), device)
    if reason is None:
        return "kvm", None
    if setting == "kvm":
        raise CapabilityError(f"accel=kvm: {reason}", hint="accel=auto uses TCG here")
    return "tcg", reason


def _why_no_kvm(qemu: Qemu, host: str, device: Path) -> str | None:
    if host not in ("ppc64", "ppc64le"):
        return f"this host is {host}, and KVM runs pseries guests on ppc64 hosts only"
    if not qemu.has_kvm:
        return f"{qemu.path} is built without KVM"
    # _IO() is 0 << 30 on most architectures and 1 << 29 on powerpc (asm/ioctl.h).
    get_api_version = 0x2000AE00
    try:
        handle = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        return f"{device}: {error.strerror}"
    try:
        api = fcntl.ioctl(handle, get_api_version, 0)
    except OSError as error:
        return f"{device} is not KVM: {error.strerror}"
    finally:
        os.close(handle)
    return None if api == KVM_API_VERSION else f"{device} has API version {api}, not 12"


def is_fetched(cache: Cache, setting: str) -> bool:
    """Return True if the cache holds the QEMU of a setting 'debian:SUITE'."""
    arch = _DEBIAN_ARCH.get(platform.machine(), "")
    return cache.find("qemu", _fetched_fields(setting.removeprefix("debian:"), arch)) is not None


def local(archive: Archive) -> list[Qemu]:
    """The QEMUs that need no download: the installed one, and those fetched before; no doubles."""
    settings = [f"debian:{suite}" for suite in _SUITES]
    settings = [setting for setting in settings if is_fetched(archive.cache, setting)]
    if shutil.which(BINARY):
        settings.insert(0, "auto")
    qemus = (resolve(archive, setting) for setting in settings)
    return list({qemu.key: qemu for qemu in qemus}.values())


def _fetched_fields(suite: str, arch: str) -> dict[str, str]:
    return {"suite": suite, "arch": arch, "format": _FETCHED_FORMAT}


def _locate(archive: Archive, setting: str) -> tuple[tuple[str, ...], Path]:
    if setting.startswith("debian:"):
        return _fetched(archive, setting.removeprefix("debian:"))
    if setting == "auto":
        program = shutil.which(BINARY)
        if program is None:
            raise HostError(f"{BINARY} is not installed", hint=INSTALL_HINT)
        path = Path(program)
    else:
        path = expanded(Path(setting))
        if "/" not in setting and (on_path := shutil.which(setting)):
            path = Path(on_path)
    # Absolute, because QEMU is started in other folders. Symbolic links are not resolved, because
    # a QEMU in its build folder finds its firmware relative to argv[0].
    path = path.absolute()
    if not path.exists():
        raise ConfigError(f"qemu={setting}: there is no such file", hint=INSTALL_HINT)
    if path.is_dir():
        raise ConfigError(f"qemu={setting} is a folder", hint=f"name the binary, {BINARY}")
    if not os.access(path, os.X_OK):
        raise ConfigError(f"qemu={setting} is not executable", hint=f"chmod +x {path}")
    return (str(path),), path


def _fetched(archive: Archive, suite: str) -> tuple[tuple[str, ...], Path]:
    if not re.fullmatch(r"[a-z][a-z0-9-]*", suite):
        raise ConfigError(
            f"qemu=debian:{suite} is not the name of a suite", hint="example: debian:trixie"
        )
    arch = _DEBIAN_ARCH.get(platform.machine())
    if arch is None:
        raise ConfigError(
            f"qemu=debian:{suite}: Debian has no packages for this host ({platform.machine()})",
            hint="set qemu= to the path of a QEMU",
        )

    require_loader(archive.cache.root)

    def build(folder: Path) -> None:
        with log.step(f"fetching QEMU of Debian {suite}"):
            archive.extract(
                ["qemu-system-ppc"],
                suite=suite,
                arch=arch,
                target=folder / "root",
                title="QEMU",
            )
            for unused in ("doc", "man", "locale", "icons"):
                shutil.rmtree(folder / "root/usr/share" / unused, ignore_errors=True)
            # Do not publish a QEMU that does not start.
            argv_prefix, path = _prefix_in(folder / "root")
            ask(argv_prefix, path)

    fields = _fetched_fields(suite, arch)
    entry = archive.cache.ensure("qemu", fields, build, needs_bytes=_NEEDS_BYTES)
    return _prefix_in(entry.path / "root")


def _prefix_in(root: Path) -> tuple[tuple[str, ...], Path]:
    """Return prefix and path of a QEMU unpacked into `root`, with its C library and firmware."""
    path = root / "usr/bin" / BINARY
    try:
        with path.open("rb") as file:
            segments = ELFFile(file).iter_segments()
            loaders = [s.get_interp_name() for s in segments if isinstance(s, InterpSegment)]
    except (OSError, ELFError) as error:
        raise HostError(f"{path} is not a program: {error}") from error
    if not loaders:
        raise HostError(f"{path} is not a dynamically linked program")
    # Two levels: some packages have a library folder of their own (pulseaudio).
    libraries = [*root.glob("usr/lib/*/lib*.so*"), *root.glob("usr/lib/*/*/lib*.so*")]
    folders = sorted({library.parent for library in libraries})
    prefix = (
        str(_inside(root, root / loaders[0].lstrip("/"))),
        "--library-path",
        ":".join(str(folder) for folder in folders),
        str(path),
        "-L",
        str(root / "usr/share/qemu"),
    )
    return prefix, path


def _inside(root: Path, path: Path) -> Path:
    """Resolve a symbolic link as if `root` were the root folder."""
    for _ in range(8):
        if not path.is_symlink():
            break
        target = path.readlink()
        path = root / str(target).lstrip("/") if target.is_absolute() else path.parent / target
    return path


def _binary_key(cache: Cache, path: Path) -> str:
    return hashlib.sha256(cache.identity(path).encode()).hexdigest()[:16]


def _remember(cache: Cache, key: str, name: str, compute: Callable[[], JSON]) -> JSON:
    def build(folder: Path) -> None:
        (folder / "answer.json").write_text(json.dumps(compute()))

    entry = cache.ensure("qemu-facts", {"binary": key, "question": name}, build)
    return json.loads((entry.path / "answer.json").read_bytes())


def _from_facts(facts: JSON, argv_prefix: tuple[str, ...], path: Path, key: str) -> Qemu:
    major, minor, micro = facts["version"]
    return Qemu(
        argv_prefix=argv_prefix,
        path=path,
        key=key,
        version=(major, minor, micro),
        version_text=facts["version_text"],
        machine=facts["machine"],
        machine_types=frozenset(facts["machine_types"]),
        properties={kind: frozenset(names) for kind, names in facts["properties"].items()},
        has_kvm=facts["kvm"],
        has_netdev_user=facts["netdev_user"],
        cpu_models=frozenset(facts["cpu_models"]),
        qmp_commands=frozenset(facts["qmp_commands"]),
        migration_capabilities=frozenset(facts["migration_capabilities"]),
    )
