# SPDX-License-Identifier: GPL-2.0-or-later
"""`paprscm cache`: list, prune, export and import the entries of the cache."""

from __future__ import annotations

import argparse
import re
import shutil
import time

from rich.console import Console
from rich.table import Table

from paprscm.debian import kernel_source
from paprscm.debian.packages import Archive
from paprscm.errors import ConfigError
from paprscm.guest.environment import prepare
from paprscm.hcall import bare_metal
from paprscm.host import transfer
from paprscm.host.cache import Cache
from paprscm.settings import Settings
from paprscm.vm import sync_shim

DAY_S = 86400.0


def list_entries(_arguments: argparse.Namespace, chosen: Settings) -> int:
    """Print a table of the entries."""
    table = Table(box=None)
    for name in ("kind", "key", "MB", "days", "fields"):
        table.add_column(name, justify="right" if name in ("MB", "days") else "left")
    for entry in Cache(chosen.cache_dir).entries():
        days = f"{(time.time() - entry.used) / DAY_S:.1f}"
        fields = ", ".join(f"{k}={_short(v)}" for k, v in sorted(entry.fields.items()))
        table.add_row(entry.kind, entry.key, f"{entry.size_bytes / 1e6:.0f}", days, fields)
    Console().print(table)
    return 0


def _short(value: str) -> str:
    """A field's value for a table; a digest is abbreviated."""
    return value[:12] if re.fullmatch("[0-9a-f]{16,}", value) else value[:40]


def prune(arguments: argparse.Namespace, chosen: Settings) -> int:
    """Remove entries that were not used for --days."""
    if arguments.days < 0:
        raise ConfigError("--days cannot be negative")
    cache, unused_for_s = Cache(chosen.cache_dir), arguments.days * DAY_S
    free = shutil.disk_usage(cache.root).free if cache.root.exists() else 0
    entries = cache.prune(unused_for_s=unused_for_s)
    Archive.of(chosen).prune(unused_for_s=unused_for_s)
    freed = (shutil.disk_usage(cache.root).free - free) / 1e6 if cache.root.exists() else 0
    print(f"{len(entries)} entries removed, {freed:.0f} MB")
    return 0


def export(arguments: argparse.Namespace, chosen: Settings) -> int:
    """Write the entries for these settings to one file."""
    cache = Cache(chosen.cache_dir)
    started = time.time() - 1
    prepare(chosen, make_snapshot=True)
    bare_metal.compile_program(cache)
    sync_shim.build(cache)
    entries = [
        entry
        for entry in cache.entries()
        if entry.used >= started
        and not (entry.is_workspace or entry.kind == kernel_source.SOURCE_KIND)
    ]
    size_bytes = transfer.export(entries, arguments.file)
    print(f"{len(entries)} entries, {size_bytes / 1e6:.0f} MB: {arguments.file}")
    return 0


def import_file(arguments: argparse.Namespace, chosen: Settings) -> int:
    """Add the entries of an exported file."""
    added, present = transfer.restore(Cache(chosen.cache_dir), arguments.file)
    print(f"{len(added)} entries added, {present} were there")
    return 0
