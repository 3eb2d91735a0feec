# SPDX-License-Identifier: GPL-2.0-or-later
"""Parser of DIMMs on the command line: slot=0,pmem=on,size=512M,file=PATH."""

from __future__ import annotations

import dataclasses
import difflib
import re
from pathlib import Path
from typing import Any

from paprscm.errors import ConfigError
from paprscm.vm.machine import Nvdimm

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}

# Key, field of Nvdimm, and type.
_KEYS = {
    "slot": ("slot", "int"),
    "device": ("device", "str"),
    "pmem": ("pmem", "bool"),
    "pmem-override": ("pmem_override", "bool"),
    "size": ("size_bytes", "size"),
    "label": ("label_bytes", "size"),
    "uuid": ("uuid", "str"),
    "share": ("share", "bool"),
    "unarmed": ("unarmed", "bool"),
    "readonly": ("read_only", "bool"),
    "file": ("file", "path"),
}


def parse_size(text: str) -> int:
    """A size in bytes, from a number with an optional K, M, G or T.

    Raises:
        ConfigError: it is not a size.
    """
    match = re.fullmatch(r"(\d+)([KMGT]?)(?:iB)?", text)
    if match is None:
        raise ConfigError(f"'{text}' is not a size", hint="such as 512M or 131072")
    return int(match[1]) * _UNITS[match[2]]


def parse_nvdimm(text: str, *, slot: int) -> Nvdimm:
    """Parse one DIMM from comma-separated key=value pairs.

    Args:
        text: such as "pmem=on,size=1G"; may be empty.
        slot: the slot if the text has none.

    Raises:
        ConfigError: a key or value is invalid, or such a DIMM is impossible.
    """
    fields: dict[str, Any] = {"slot": slot}
    for pair in filter(None, text.split(",")):
        key, equals, value = pair.partition("=")
        if key not in _KEYS:
            close = difflib.get_close_matches(key, _KEYS, n=1)
            hint = f"did you mean {close[0]}?" if close else "one of " + ", ".join(_KEYS)
            raise ConfigError(f"a DIMM has no '{key}'", hint=hint)
        if not equals:
            raise ConfigError(f"{key} of a DIMM needs a value", hint=f"{key}=…")
        name, kind = _KEYS[key]
        fields[name] = _value(key, kind, value)
    file = fields.get("file")
    if file is not None and "size_bytes" not in fields:
        defaults = {field.name: field.default for field in dataclasses.fields(Nvdimm)}
        label = fields.get("label_bytes", defaults["label_bytes"])
        try:
            fields["size_bytes"] = file.stat().st_size - label
        except OSError as error:
            raise ConfigError(f"backing file {file}: {error.strerror}") from error
    return Nvdimm(**fields)


def _value(key: str, kind: str, text: str) -> Any:
    if kind == "size":
        return parse_size(text)
    if kind == "path":
        return Path(text)
    if kind == "bool":
        if text not in ("on", "off"):
            raise ConfigError(f"{key}={text} is neither on nor off")
        return text == "on"
    if kind == "int":
        if not text.isdecimal():
            raise ConfigError(f"{key}={text} is not a number")
        return int(text)
    return text
