# SPDX-License-Identifier: GPL-2.0-or-later
"""Host prerequisites of a kernel build: environment variables, tools and headers."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from paprscm.errors import ConfigError, HostError
from paprscm.host import process

# The variables passed to a build. kbuild reads dozens (Linux, Documentation/kbuild/kbuild.rst), but
# each one passed on would have to be part of a kernel's key.
_PASSED = ("HOME", "LD_LIBRARY_PATH", "PATH", "PKG_CONFIG_PATH", "TMPDIR")
_PASSED_PREFIXES = ("CCACHE_", "DISTCC_")
# Variables that users set on purpose; a warning names them.
_MISSED = re.compile(
    r"LLVM(?:_IAS)?|LOCALVERSION|EXTRAVERSION|K(?:C|CPP|A|RUST)FLAGS|(?:KBUILD_)?HOST\w*FLAGS|"
    r"(?:[CA]|LD|RUST)FLAGS_\w+|KBUILD_\w+|KCONFIG_\w+|INSTALL_\w+"
)


def kbuild_environment(variables: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """Variables to pass to kbuild, and names of others that it would read."""
    passed = {
        name: value
        for name, value in variables.items()
        if name in _PASSED or name.startswith(_PASSED_PREFIXES)
    }
    return passed, sorted(name for name in variables if _MISSED.fullmatch(name))


@dataclass(frozen=True)
class _Need:
    """A tool or a C header that the host must have for a kernel with a certain option.

    Attributes:
        option: without "CONFIG_".
        part: a tool in PATH, or a header with the suffix ".h".
        library: pkg-config name of the header's library.
        debian, fedora: package with it.
    """

    option: str
    part: str
    debian: str
    fedora: str
    library: str = ""

    def is_met(self) -> bool:
        if not self.part.endswith(".h"):
            return shutil.which(self.part) is not None
        try:
            # As in scripts/Makefile and tools/objtool/Makefile.
            flags = process.run(["pkg-config", "--cflags", self.library]).text.split()
        except HostError:
            flags = []
        try:
            process.run(["gcc", *flags, "-E", "-x", "c", "-include", self.part, "/dev/null"])
        except HostError:
            return False
        return True


_OPENSSL_H = ("openssl/opensslv.h", "libssl-dev", "openssl-devel", "libcrypto")
_ELF_H = ("gelf.h", "libelf-dev", "elfutils-libelf-devel", "libelf")
# Linux, Documentation/process/changes.rst; certs/Makefile, scripts/Makefile, Makefile (prepare),
# tools/bpf/resolve_btfids/Makefile, kernel/gen_kheaders.sh, scripts/Makefile.modinst.
_NEEDS = (
    _Need("MODULE_SIG_FORMAT", *_OPENSSL_H),
    _Need("MODULE_SIG", "openssl", "openssl", "openssl"),
    _Need("SYSTEM_TRUSTED_KEYRING", *_OPENSSL_H),
    _Need("OBJTOOL", *_ELF_H),
    _Need("DEBUG_INFO_BTF", "pahole", "dwarves", "dwarves"),
    _Need("DEBUG_INFO_BTF", *_ELF_H),
    _Need("DEBUG_INFO_BTF", "zlib.h", "zlib1g-dev", "zlib-devel", "zlib"),
    _Need("IKHEADERS", "cpio", "cpio", "cpio"),
    _Need("MODULE_COMPRESS_ZSTD", "zstd", "zstd", "zstd"),
)
_KEY_FILES = ("SYSTEM_TRUSTED_KEYS", "SYSTEM_REVOCATION_KEYS", "MODULE_SIG_KEY")
_GENERATED_KEY = "certs/signing_key.pem"


def require_prerequisites(produced: Mapping[str, str], tree: Path) -> None:
    """Require the tools, headers and key files of a configuration, before the build starts.

    Args:
        produced: the options, from `parse_config`.
        tree: the kernel source; names of key files are relative to it.

    Raises:
        HostError: tools or headers are missing; the hint names their packages.
        ConfigError: a key file does not exist; a distribution's .config often names one.
    """
    lacking = [need for need in _NEEDS if need.option in produced and not need.is_met()]
    if lacking:
        options: dict[str, list[str]] = {}
        for need in lacking:
            options.setdefault(need.part, []).append(f"CONFIG_{need.option}")
        parts = ", ".join(f"{part} (for {', '.join(names)})" for part, names in options.items())
        debian, fedora = (
            " ".join(dict.fromkeys(getattr(need, kind) for need in lacking))
            for kind in ("debian", "fedora")
        )
        raise HostError(
            f"this machine lacks tools or headers for the kernel's configuration: {parts}",
            hint=f"apt install {debian} (Fedora: dnf install {fedora}), or switch the options off",
        )
    for option in _KEY_FILES:
        name = produced.get(option, "").strip('"')
        if name in ("", _GENERATED_KEY) or name.startswith("pkcs11:") or (tree / name).exists():
            continue
        raise ConfigError(
            f"CONFIG_{option} names {name}, which is not in {tree}",
            hint=f'scripts/config --file FILE --set-str {option} ""'
            if option != "MODULE_SIG_KEY"
            else f"scripts/config --file FILE --set-str {option} {_GENERATED_KEY}",
        )
