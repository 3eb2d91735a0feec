# SPDX-License-Identifier: GPL-2.0-or-later
"""Facts about the classes of a job's tests, read in a separate process.

Not in the job's process: Avocado's resolver has prepended the folders of all modules that it
examined to sys.path, so that an import there may find a wrong module
(known_issues/avocado-safeloader-sys-path).
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib.util
import inspect
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType

from avocado.core.exceptions import JobError
from avocado.core.job import Job

from paprscm.plugins import fork_server

_LIMIT_S = 120


@dataclass(frozen=True)
class ClassFacts:
    """Facts about one test's class.

    Attributes:
        ours: it is a QemuTest.
        needs_guest: it is a PaprScmTest; other tests need neither kernel nor userland.
        parameters: names of the parameters that it and its bases read from `self.params`.
        contracts: first paragraph of the docstring of each test.
    """

    ours: bool
    needs_guest: bool
    parameters: tuple[str, ...]
    contracts: dict[str, str]


def read_facts(job: Job) -> dict[str, ClassFacts]:
    """Facts about each Python test of a job, by its URI.

    A test whose module cannot be imported is left out; Avocado reports it when the test runs.

    Raises:
        JobError: an import ended the process or timed out.
    """
    tests = [test for suite in job.test_suites for test in suite.tests]
    uris = {str(test.uri) for test in tests if test.kind == "avocado-instrumented"}
    classes = {uri: uri.rpartition(".")[0] for uri in uris}
    answers = _query(tuple(sorted(set(classes.values()))))
    return {uri: answers[name] for uri, name in classes.items() if name in answers}


@functools.lru_cache(maxsize=1)
def _query(names: tuple[str, ...]) -> dict[str, ClassFacts]:
    """Facts by "path:Class"; cached, because several plugins need those of the same job."""
    if not names:
        return {}
    try:
        answers = fork_server.call(f"{__name__}:read_classes", names).result(_LIMIT_S)
    except TimeoutError as error:
        raise JobError(f"reading the classes of the job's tests took {_LIMIT_S} s") from error
    if answers is None:
        raise JobError("the classes of the job's tests cannot be read: an import ended the process")
    return {
        name: ClassFacts(**{**facts, "parameters": tuple(facts["parameters"])})
        for name, facts in answers.items()
    }


def read_classes(names: list[str]) -> dict[str, dict[str, object]]:
    """Facts by "path:Class", as dictionaries; a child of the fork server calls it."""
    from paprscm.testcase import PaprScmTest, QemuTest

    answers = {}
    # The output of test modules at their import is not part of the job's.
    with contextlib.redirect_stdout(sys.stderr):
        for name in names:
            path, _, class_name = name.rpartition(":")
            # Any exception, and sys.exit(): Avocado reports errors of the module.
            with contextlib.suppress(Exception, SystemExit):
                test_class = getattr(_module(path), class_name)
                facts = ClassFacts(
                    ours=issubclass(test_class, QemuTest),
                    needs_guest=issubclass(test_class, PaprScmTest),
                    parameters=tuple(sorted(_parameters(test_class.__mro__))),
                    contracts={
                        method: " ".join((inspect.getdoc(test) or "").split("\n\n")[0].split())
                        for method, test in inspect.getmembers(test_class, inspect.isfunction)
                        if method.startswith("test")
                    },
                )
                answers[name] = asdict(facts)
    return answers


@functools.cache
def _module(path: str) -> ModuleType:
    """Import a file as Avocado does (avocado/core/utils/loader.py, load_test)."""
    name, folder = Path(path).name.split(".")[0], str(Path(path).resolve().parent)
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(folder)
    return module


def _parameters(classes: Iterable[type]) -> set[str]:
    return {
        name for one in classes if one is not object for name in _requested_names(one.__module__)
    }


@functools.cache
def _requested_names(module: str) -> frozenset[str]:
    """The literal names in a module's calls of `….params.get(name)`."""
    names = set()
    for node in ast.walk(ast.parse(inspect.getsource(sys.modules[module]))):
        match node:
            case ast.Call(
                func=ast.Attribute(value=ast.Attribute(attr="params"), attr="get"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                names.add(name)
    return frozenset(names)
