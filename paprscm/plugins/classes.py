# SPDX-License-Identifier: GPL-2.0-or-later
"""Facts about the test classes of a job's files, read in a separate process.

Not in the job's process: Avocado's resolver has prepended the folders of all modules that it
examined to sys.path, so that an import there may find a wrong module
(known_issues/avocado-safeloader-sys-path).
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import inspect
import sys
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from avocado.core.exceptions import JobError
from avocado.core.job import Job

from paprscm.plugins import fork_server

_LIMIT_S = 120


@dataclass(frozen=True)
class TestFacts:
    """Facts about one test, from the docstrings of the method and of the classes.

    Attributes:
        contract: first paragraph of the method's docstring.
        tags: values of each tag, none for a plain one.
        dependencies: as Avocado has them.
    """

    contract: str
    tags: dict[str, list[str]]
    dependencies: list[dict[str, Any]]


@dataclass(frozen=True)
class ClassFacts:
    """Facts about one class with tests.

    Attributes:
        ours: it is a QemuTest.
        needs_guest: it is a PaprScmTest; other tests need neither kernel nor userland.
        parameters: names of the parameters that it and its bases read from `self.params`.
        tests: its tests by method name: its own in the order of the source, then inherited ones.
    """

    ours: bool
    needs_guest: bool
    parameters: tuple[str, ...]
    tests: dict[str, TestFacts]


# By file, then by class. A file is read once in a job, for several plugins.
_read: dict[str, dict[str, ClassFacts]] = {}
# So is one whose import hangs or ends the process, or that was read together with such a file.
_failed: dict[str, JobError] = {}


def read_facts(job: Job) -> dict[str, ClassFacts]:
    """Facts about the class of each Python test of a job, by the test's URI.

    A test whose module cannot be imported is left out; Avocado reports it when the test runs.

    Raises:
        JobError: an import ended the process or timed out.
    """
    tests = [test for suite in job.test_suites for test in suite.tests]
    facts = {}
    uris = [str(test.uri) for test in tests if test.kind == "avocado-instrumented"]
    files = read_files({uri.rpartition(":")[0] for uri in uris})
    for uri in uris:
        path, _, name = uri.rpartition(":")
        if (class_name := name.partition(".")[0]) in files[path]:
            facts[uri] = files[path][class_name]
    return facts


def read_files(paths: Collection[str]) -> dict[str, dict[str, ClassFacts]]:
    """Facts about the classes with Avocado tests that are defined in each file, by name.

    There are none if the file cannot be imported.

    Raises:
        JobError: as read_facts().
    """
    for failed in _failed.keys() & set(paths):
        raise _failed[failed]
    if missing := sorted(set(paths) - _read.keys()):
        try:
            answers = _ask(missing)
        except JobError as error:
            _failed.update(dict.fromkeys(missing, error))
            raise
        for path, classes in answers.items():
            _read[path] = {name: _class_facts(**fields) for name, fields in classes.items()}
    return {path: _read[path] for path in paths}


def _ask(paths: list[str]) -> dict[str, dict[str, dict[str, Any]]]:
    try:
        answers = fork_server.call(f"{__name__}:read_classes", paths).result(_LIMIT_S)
    except TimeoutError as error:
        raise JobError(f"reading the job's tests took {_LIMIT_S} s") from error
    if answers is None:
        raise JobError("the job's tests cannot be read: an import ended the process")
    return dict(answers)


def _class_facts(
    *, tests: dict[str, dict[str, Any]], parameters: list[str], **fields: bool
) -> ClassFacts:
    facts = {method: TestFacts(**test) for method, test in tests.items()}
    return ClassFacts(**fields, parameters=tuple(parameters), tests=facts)


def read_classes(paths: list[str]) -> dict[str, dict[str, dict[str, Any]]]:
    """The answer for read_files(), as dictionaries; a child of the fork server calls it."""
    # Not at the top: Avocado imports this file while it imports itself.
    from avocado import Test
    from avocado.core.safeloader.docstring import check_docstring_directive

    answers: dict[str, dict[str, dict[str, Any]]] = {path: {} for path in paths}
    # The output of test modules at their import is not part of the job's.
    with contextlib.redirect_stdout(sys.stderr):
        for path in paths:
            # Any exception, and sys.exit(): Avocado reports errors of the module.
            with contextlib.suppress(Exception, SystemExit):
                module = _module(path)
                answers[path] = {
                    name: asdict(_facts(found))
                    for name, found in vars(module).items()
                    if inspect.isclass(found)
                    and issubclass(found, Test)
                    and found.__module__ == module.__name__
                    and not check_docstring_directive(found.__doc__, "disable")
                }
    return answers


def _facts(test_class: type) -> ClassFacts:
    from avocado.core.safeloader.docstring import check_docstring_directive

    from paprscm.testcase import PaprScmTest, QemuTest

    # "enable" is for a class whose bases Avocado need not look at.
    alone = check_docstring_directive(test_class.__doc__, "enable")
    classes = (test_class,) if alone else test_class.__mro__
    methods = [
        name
        for one in classes
        for name, value in vars(one).items()
        if name.startswith("test") and inspect.isfunction(value)
    ]
    return ClassFacts(
        ours=issubclass(test_class, QemuTest),
        needs_guest=issubclass(test_class, PaprScmTest),
        parameters=tuple(sorted(_parameters(test_class.__mro__))),
        tests={method: _test_facts(classes, method) for method in dict.fromkeys(methods)},
    )


def _test_facts(classes: tuple[type, ...], method: str) -> TestFacts:
    """Facts about a test of a class and its bases, with the precedence of Avocado's loader.

    That is in avocado/core/safeloader/core.py.
    """
    from avocado.core.safeloader.docstring import (
        get_docstring_directives_dependencies,
        get_docstring_directives_tags,
    )

    function = getattr(classes[0], method)
    place = next(number for number, one in enumerate(classes) if method in vars(one))
    owner, derived, bases = classes[place], classes[:place], classes[place + 1 :]
    tags: dict[str, set[str] | None] = {}
    for one in (*reversed(bases), function, owner, *reversed(derived)):
        tags.update(get_docstring_directives_tags(one.__doc__))
    return TestFacts(
        contract=" ".join((inspect.getdoc(function) or "").split("\n\n")[0].split()),
        tags={name: sorted(values or ()) for name, values in tags.items()},
        dependencies=[
            dependency
            for one in (function, owner)
            for dependency in get_docstring_directives_dependencies(one.__doc__)
        ],
    )


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


@cache
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
