# SPDX-License-Identifier: GPL-2.0-or-later
"""The resolver finds the tests that Avocado's own finds, by another way."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from avocado.core.exceptions import JobError
from avocado.core.resolver import ReferenceResolution, ReferenceResolutionResult
from avocado.plugins.resolvers import AvocadoInstrumentedResolver

from paprscm.paths import ROOT, TESTS
from paprscm.plugins import classes, fork_server
from paprscm.plugins.resolver import ImportingResolver

BASES = """
from paprscm.testcase import QemuTest

class Common(QemuTest):
    \"\"\"Tests of several classes.

    :avocado: disable
    :avocado: tags=common,kind:base
    \"\"\"

    def test_second(self): pass

    def test_inherited(self):
        \"\"\"Inherited.

        :avocado: tags=own,kind:method
        \"\"\"

class Elsewhere(QemuTest):
    def test_elsewhere(self): pass
"""
# In Avocado's order, own tests come first.
DERIVED = """
import avocado
from bases import Common, Elsewhere
from paprscm.testcase import QemuTest

class Derived(Common):
    \"\"\"Derived.

    :avocado: tags=derived,kind:derived
    \"\"\"

    def test_zero(self):
        \"\"\"First.

        :avocado: tags=zero
        :avocado: dependency={"type": "package", "name": "hello"}
        \"\"\"

    def test_alpha(self): pass

    def helper(self): pass

class Again(Derived):
    def test_alpha(self): pass

class Alone(Derived):
    \"\"\"Its own tests only.

    :avocado: enable
    :avocado: tags=alone
    \"\"\"

    def test_alone(self): pass

class _Small(QemuTest):
    def test(self): pass

class Avocados(avocado.Test):
    def test_not_ours(self): pass

class NoTest:
    def test_nothing(self): pass
"""
MARKER = "from pathlib import Path\nPath(__file__).with_suffix('.ran').touch()\n"


@pytest.fixture(autouse=True)
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is read yet."""
    monkeypatch.setattr(classes, "_read", {})
    monkeypatch.setattr(classes, "_failed", {})


@pytest.fixture(autouse=True, scope="module")
def server() -> Iterator[None]:
    """One server for all, which can import what ten.py imports."""
    fork_server.start.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(TESTS / "map_sync"))
        fork_server.start()
    yield
    fork_server.start().close()
    fork_server.start.cache_clear()


def listed(resolution: ReferenceResolution) -> list[tuple[object, ...]]:
    """Everything that Avocado knows about each test."""
    found: list[tuple[object, ...]] = []
    for test in resolution.resolutions:
        tags = sorted((tag, sorted(values or ())) for tag, values in (test.tags or {}).items())
        found.append((test.kind, test.uri, tags, test.dependencies, test.assets))
    return found


def both(resolver: ImportingResolver, reference: str) -> list[list[tuple[object, ...]]]:
    """Our tests of a reference, and Avocado's."""
    of_avocado: Any = AvocadoInstrumentedResolver
    before = list(sys.path)
    found = [listed(one.resolve(reference)) for one in (resolver, of_avocado())]
    # Avocado's leaves folders there, which slow it down.
    sys.path[:] = before
    return found


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The requests to the server, with their arguments."""
    made: list[tuple[Any, ...]] = []
    call = fork_server.call

    def count(*words: Any) -> fork_server.Child:
        made.append(words)
        return call(*words)

    monkeypatch.setattr(fork_server, "call", count)
    return made


def test_the_suite_s_tests_are_avocado_s(
    monkeypatch: pytest.MonkeyPatch, requests: list[tuple[Any, ...]]
) -> None:
    ten = str(ROOT / "selftests" / "cold_and_warm" / "ten.py")
    monkeypatch.syspath_prepend(TESTS / "map_sync")
    resolver = ImportingResolver({"resolver.references": [str(TESTS), ten]})
    files = sorted(map(str, TESTS.rglob("test_*.py")))
    assert len(files) > 50
    for file in (*files, ten):
        ours, avocado_s = both(resolver, file)
        assert ours == avocado_s
        assert ours
    assert len(requests) == 1


def test_classes_tags_and_order_are_avocado_s(tmp_path: Path) -> None:
    (tmp_path / "bases.py").write_text(BASES)
    file = tmp_path / "derived.py"
    file.write_text(DERIVED)
    ours, avocado_s = both(ImportingResolver(), str(file))
    assert ours == avocado_s
    names = [str(test[1]).partition(":")[2] for test in ours]
    assert names[:4] == [
        f"Derived.test_{name}" for name in ("zero", "alpha", "second", "inherited")
    ]
    assert {"_Small.test", "Avocados.test_not_ours", "Again.test_inherited"} < {*names}
    assert [name for name in names if name.startswith("Alone.")] == ["Alone.test_alone"]
    ours, avocado_s = both(ImportingResolver(), str(tmp_path / "bases.py"))
    assert ours == avocado_s
    assert [str(test[1]).rpartition(".")[2] for test in ours] == ["test_elsewhere"]
    ours, avocado_s = both(ImportingResolver(), f"{file}:Again.*(alpha|zero)")
    assert ours == avocado_s
    assert len(ours) == 2


def test_files_of_others_are_not_executed(tmp_path: Path) -> None:
    file = tmp_path / "other.py"
    file.write_text(f"# import paprscm would be ours.\n{MARKER}")
    resolver = ImportingResolver({"resolver.references": [str(tmp_path)]})
    assert resolver.resolve(str(file)).result == ReferenceResolutionResult.NOTFOUND
    assert not file.with_suffix(".ran").exists()
    file.write_text(f"import paprscm\n{MARKER}")
    resolver.resolve(str(file))
    assert file.with_suffix(".ran").exists(), "the file cannot show that it was executed"


@pytest.mark.parametrize("end", ["import nothing_of_this_name", "raise SystemExit(1)"])
def test_a_file_that_cannot_be_imported_is_left_to_avocado(tmp_path: Path, end: str) -> None:
    file = tmp_path / "broken.py"
    file.write_text(
        f"from paprscm.testcase import QemuTest\n{end}\n\n"
        "class Broken(QemuTest):\n    def test(self): pass\n"
    )
    ours, avocado_s = both(ImportingResolver(), str(file))
    assert ours == []
    assert len(avocado_s) == 1


def test_an_import_that_ends_the_process_is_tried_once(
    tmp_path: Path, requests: list[tuple[Any, ...]]
) -> None:
    for name in "ab":
        text = "import os\nimport paprscm\nos._exit(1)\n" if name == "a" else "import paprscm\n"
        (tmp_path / f"{name}.py").write_text(text)
    resolver = ImportingResolver({"resolver.references": [str(tmp_path)]})
    for name in "ab":
        # Avocado's resolution takes it for an error, and goes on with its own resolver.
        with pytest.raises(JobError, match="an import ended the process"):
            resolver.resolve(str(tmp_path / f"{name}.py"))
    assert len(requests) == 1


def test_facts_of_a_file_whose_folder_has_a_colon(tmp_path: Path) -> None:
    folder = tmp_path / "a:b"
    folder.mkdir()
    (folder / "derived.py").write_text(
        "from paprscm.testcase import QemuTest\n\nclass One(QemuTest):\n    def test(self): pass\n"
    )
    uri = f"{folder}/derived.py:One.test"
    runnable = SimpleNamespace(kind="avocado-instrumented", uri=uri)
    job: Any = SimpleNamespace(test_suites=[SimpleNamespace(tests=[runnable])])
    assert classes.read_facts(job)[uri].ours
