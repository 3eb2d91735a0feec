# SPDX-License-Identifier: GPL-2.0-or-later
"""Resolver of this suite's tests, which imports their files in a child of the fork server.

Avocado's own resolver reads the source of each base class and of each module on the way to it again
for each class (known_issues/avocado-safeloader-parses-again): 7 s for this suite. It still resolves
what is not ours or cannot be imported.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from avocado.core.extension_manager import PluginPriority
from avocado.core.plugin_interfaces import Resolver
from avocado.core.references import reference_split
from avocado.core.resolver import ReferenceResolution
from avocado.plugins.resolvers import AvocadoInstrumentedResolver, python_resolver

from paprscm.plugins.classes import TestFacts, read_files

# Files without it are not imported: an import executes what Avocado would only read.
_IMPORT = re.compile(rb"^(from|import) paprscm\b", re.MULTILINE)

# As python_resolver() takes it: method, tags, dependencies.
_Test = tuple[str, dict[str, set[str] | None], list[dict[str, Any]]]


class ImportingResolver(Resolver):
    """Resolves references to Python files that import paprscm.

    Args:
        config: Avocado's settings; all files of the job are read at the first reference to one.
    """

    name = "paprscm"
    description = "Test resolver for tests of persistent memory on pseries"
    # Before Avocado's resolver of Python files, which is HIGH.
    priority = PluginPriority.VERY_HIGH

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        self._references = (config or {}).get("resolver.references") or []
        self._files: set[str] | None = None

    def resolve(self, reference: str) -> ReferenceResolution:
        """Find the tests of a reference, such as `tests/flush/test_table.py:FlushTable`."""
        found: ReferenceResolution = python_resolver(
            AvocadoInstrumentedResolver.name, reference, self._find
        )
        return found

    def _find(self, path: str) -> tuple[dict[str, list[_Test]], set[str]]:
        if self._files is None:
            self._files = {file for file in _python_files(self._references) if _is_ours(file)}
        if path not in self._files and not _is_ours(path):
            return {}, set()
        self._files.add(path)
        classes = read_files(self._files)[path]
        return {
            name: [_described(method, test) for method, test in facts.tests.items()]
            for name, facts in classes.items()
        }, set()


def _described(method: str, test: TestFacts) -> _Test:
    tags = {tag: set(values) or None for tag, values in test.tags.items()}
    # Avocado empties the dictionaries that it is given.
    return method, tags, [dict(dependency) for dependency in test.dependencies]


def _python_files(references: list[str]) -> Iterator[str]:
    """The files that references name, as Avocado writes them (avocado/core/resolver.py)."""
    for reference in references:
        yield reference_split(reference)[0]
        for folder, _, names in os.walk(reference):
            # Not a Path, which would not keep "./".
            yield from (f"{folder.rstrip('/')}/{name}" for name in names if name.endswith(".py"))


def _is_ours(file: str) -> bool:
    try:
        return bool(_IMPORT.search(Path(file).read_bytes()))
    except OSError:
        return False
