# SPDX-License-Identifier: GPL-2.0-or-later
"""The `paprscm` command; each verb is a stage that can be used alone."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from paprscm import known_issues, settings
from paprscm.commands import (
    bench,
    bench_ab,
    bench_flushes,
    bench_suite,
    bisect,
    builds,
    caches,
    compare,
    doctor,
    history,
    image,
    issue_report,
    manual,
    matrix,
    report,
    reproduce,
    results,
    shell,
)
from paprscm.commands.dimm_syntax import parse_nvdimm
from paprscm.commands.image import run_verb
from paprscm.debian import kernel_source
from paprscm.errors import ConfigError
from paprscm.formats import delivery
from paprscm.formats.registry import FORMATS
from paprscm.guest.environment import Environment, prepare
from paprscm.hcall.judge import branch_table, count_branches
from paprscm.host.cache import Cache
from paprscm.known_issues import PRODUCTS, read_issue
from paprscm.paths import SUITE_VARIABLE, TESTS
from paprscm.results.record import read_record
from paprscm.settings import Settings
from paprscm.vm.argv import qemu_argv, script
from paprscm.vm.machine import Machine, require


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; return its exit status. An error prints message and hint; status 2 or 3."""
    words = list(sys.argv[1:] if argv is None else argv)
    # Words after "--" are passed to Avocado unchanged.
    cut = words.index("--") if "--" in words else len(words)
    arguments = parser().parse_args(words[:cut], argparse.Namespace(rest=words[cut + 1 :]))
    overrides = {name: getattr(arguments, name, None) for name in settings.names()}
    verb: Callable[[argparse.Namespace, Settings], int] = arguments.verb
    return run_verb(lambda: verb(arguments, settings.load(overrides)), verbose=arguments.verbose)


def parser() -> argparse.ArgumentParser:
    """The parser of the `paprscm` command, with all verbs."""
    parser = argparse.ArgumentParser(
        prog="paprscm", description="Judge persistent memory of pseries guests."
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="print more")
    manual.add_options(parser)
    common = _settings_parser()
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")

    def add(name: str, verb: Callable[..., int], text: str) -> argparse.ArgumentParser:
        added = verbs.add_parser(name, help=text, description=text, parents=[common])
        added.set_defaults(verb=verb)
        return added

    add("doctor", _doctor, "Check this machine and name missing packages.")
    text = "Build or fetch QEMU, kernel and userland; print their versions."
    image.add_options(add("image", image.image, text))
    run = add("run", _run, "Run the tests; words after -- are passed to `avocado run`.")
    text = "files or test names; default: all tests of the suite"
    manual.takes_files(run.add_argument("tests", nargs="*", default=None, help=text))
    text = "only tests with these tags, such as map_sync or device,-hcall; may be repeated"
    run.add_argument("-t", dest="tags", action="append", default=[], metavar="TAG,…", help=text)
    one = add("shell", _shell, "Start a guest and open a shell: ssh, or its serial console.")
    one.add_argument("--nvdimm", action="append", default=[], metavar="KEY=VALUE,…")
    one.add_argument("--serial", action="store_true", help="the serial console; Ctrl-] leaves")
    one.add_argument("-c", "--command", help="run this command instead, and exit with its status")
    one.add_argument("--append", action="append", default=[], help="words for the kernel")
    one.add_argument("--dry-run", action="store_true", help="print QEMU's command line as a script")

    shown = add("results", _results, "Print a job's results, or convert them with --format.")
    shown.add_argument(
        "--format", dest="wanted", default="", metavar="NAME,…", help=", ".join(FORMATS)
    )
    text = "a file, or a folder for several formats; default: the standard output"
    manual.takes_files(shown.add_argument("--output", type=Path, help=text))
    text = "for kcidb: id of a build that another origin has reported, such as maestro:…"
    shown.add_argument("--build", default="", metavar="ID", help=text)
    sent = add("submit", _submit, "Deliver a job's results to KCIDB or SQUAD.")
    sent.add_argument("--to", required=True, choices=delivery.RECEIVERS)
    sent.add_argument("--build", default="", metavar="ID", help=text)
    sent.add_argument("--project", default="", metavar="GROUP/PROJECT", help="for squad")
    text = "time to wait until KCIDB has processed the report (60)"
    sent.add_argument("--wait", type=float, default=60.0, metavar="SECONDS", help=text)
    again = add("rerun", _rerun, "Run the tests of a job again, with the job's settings.")
    text = "only tests that ended as FAIL or ERROR, or were interrupted"
    again.add_argument("--failed", action="store_true", help=text)
    for one in (shown, sent, again):
        text = f"a job's folder; default: {results.LATEST}"
        manual.takes_files(
            one.add_argument("job", nargs="?", type=Path, default=results.LATEST, help=text)
        )

    matrix.add_verbs(verbs, common)
    history.add_verbs(verbs, common)
    compare.add_verb(verbs, common)
    bisect.add_verb(verbs, common)

    branches = add(
        "branches", _branches, "Print the branches of the hcalls that a job's tests have taken."
    )
    branches.add_argument(
        "job", nargs="?", type=Path, default=results.LATEST, help=f"default: {results.LATEST}"
    )

    text = "Write a static site about many jobs: verdicts over time, changes, metrics."
    report.add_options(add("report", report.write, text))

    text = "Run the reproduction of known issues; status 0: gone, 1: shown, 2: could not tell."
    again = add("reproduce", _reproduce, text)
    again.add_argument("issues", nargs="*", metavar="ISSUE", help="files of known_issues/")
    text = "all known issues, or those of one product"
    again.add_argument("--all", nargs="?", const="", choices=("", *PRODUCTS), help=text)

    text = "Print a known issue as a report to its project; nothing is sent."
    printed = add("report-issue", _report_issue, text)
    printed.add_argument("issue", metavar="ISSUE", help="a file of known_issues/")
    text = "source of the product, a tree or a tar archive: its MAINTAINERS names the receivers"
    manual.takes_files(printed.add_argument("--source", type=Path, help=text))

    builds.add_verbs(verbs, common)

    cache = verbs.add_parser("cache", help="Manage the cache of built and fetched artifacts.")
    verbs_of_cache = cache.add_subparsers(title="verbs", required=True, metavar="VERB")
    verbs_of_cache.add_parser("ls", help="List the entries.", parents=[common]).set_defaults(
        verb=caches.list_entries
    )
    for name, verb, text in (
        ("export", caches.export, "Export the entries for these settings to one file."),
        (
            "import",
            caches.import_file,
            "Check the entries of an exported file and add them to the cache.",
        ),
    ):
        moved = verbs_of_cache.add_parser(name, help=text, description=text, parents=[common])
        manual.takes_files(moved.add_argument("file", type=Path))
        moved.set_defaults(verb=verb)
    prune = verbs_of_cache.add_parser("prune", help="Remove unused entries.", parents=[common])
    prune.add_argument(
        "--days", type=float, default=30.0, help="entries not used for this many days (30); 0: all"
    )
    prune.set_defaults(verb=caches.prune)

    benches = verbs.add_parser("bench", help="Measure.").add_subparsers(
        title="verbs", required=True, metavar="VERB"
    )

    def measure(
        name: str, verb: Callable[..., int], text: str, counted: str, count: int
    ) -> argparse.ArgumentParser:
        added = benches.add_parser(name, help=text, description=text, parents=[common])
        added.add_argument("-n", type=int, default=count, help=f"number of {counted} ({count})")
        added.add_argument("--json", action="store_true", help="print the series as a line of JSON")
        series = Path(f"results/bench-{name}.jsonl")
        added.add_argument(
            "--series", type=Path, default=series, help="file to append the series to"
        )
        added.set_defaults(verb=verb)
        return added

    text = "Measure warm and cold starts of a guest, alternating, and leaks."
    start = measure("start", bench.start, text, "rounds", 10)
    start.add_argument("--warm-only", action="store_true", help="no cold starts")
    text = "Measure the suite: cold, warm, warm in parallel. Words after -- are for `avocado run`."
    suite = measure("suite", bench.suite, text, "rounds", 1)
    text = "files or test names; default: all tests of the suite"
    suite.add_argument("--tests", nargs="+", default=[_suite()], metavar="PATH", help=text)
    all_modes = ",".join(bench_suite.MODES)
    suite.add_argument("--modes", default=all_modes, help=f"some of {all_modes}")
    suite.add_argument("--keep", action="store_true", help="keep the jobs' results in results/")
    measure("hcall", bench.hcall, "Measure hcalls a second from bare metal.", "rounds", 10)
    text = "Measure flushes a second and latency, by threads in the guest and by DIMMs."
    flush = measure("flush", bench.flush, text, "rounds", 1)
    for name, numbers in (("threads", bench_flushes.THREADS), ("dimms", bench_flushes.DIMMS)):
        default = ",".join(map(str, numbers))
        flush.add_argument(f"--{name}", default=default, metavar="N,…", help=f"default: {default}")
    bench_ab.add_verb(benches, common, _suite())
    plot = Path("results/bench-flush.svg")
    flush.add_argument("--plot", type=Path, default=plot, help=f".svg or .png ({plot})")
    return parser


def _settings_parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    group = common.add_argument_group("settings (also in avocado.cfg)")
    for name in settings.names():
        option = group.add_argument(
            "--" + name.replace("_", "-"), dest=name, metavar="…", help=settings.meaning(name)
        )
        if name in ("qemu", "kernel", "modules", "cache_dir", "scratch_dir"):
            manual.takes_files(option)
    return common


def _doctor(_arguments: argparse.Namespace, chosen: Settings) -> int:
    findings = doctor.inspect_host(chosen)
    doctor.print_findings(findings)
    return 1 if doctor.is_broken(findings) else 0


def _run(arguments: argparse.Namespace, chosen: Settings) -> int:
    del chosen  # Loading has checked them; the tests read the options below.
    words = [str(Path(sys.executable).with_name("avocado")), "run"]
    words += [f"--filter-by-tags={tags}" for tags in arguments.tags]
    words += [*arguments.rest, *(arguments.tests or [_suite()])]
    for name in settings.names():
        value = getattr(arguments, name)
        if value is not None:
            words += ["-p", f"{name}={value}"]
    os.environ[SUITE_VARIABLE] = "1"
    os.execv(words[0], words)  # noqa: S606


def _suite() -> str:
    """Path of the suite's tests; relative if the working directory is the checkout."""
    inside = TESTS.is_relative_to(Path.cwd())
    return str(TESTS.relative_to(Path.cwd()) if inside else TESTS)


def _shell(arguments: argparse.Namespace, chosen: Settings) -> int:
    if not (arguments.dry_run or arguments.command):
        shell.require_terminal()
    machine = _machine(arguments)
    environment = prepare(chosen)
    for nvdimm in machine.nvdimms:
        require(environment.qemu, nvdimm)
    if arguments.dry_run:
        print(_script(environment, machine), end="")
        return 0
    mirror = sys.stdout if arguments.serial else None
    with (
        tempfile.TemporaryDirectory(prefix="paprscm-shell-") as folder,
        # The user sees the kernel's messages.
        environment.guest(machine, folder=Path(folder), allowed=[""], mirror=mirror) as guest,
    ):
        if arguments.command:
            result = guest.run(arguments.command, timeout_s=86400)
            sys.stdout.write(result.stdout)
            sys.stderr.write(result.stderr)
            return result.status
        if arguments.serial:
            shell.connect_serial(guest)
            return 0
        return shell.connect_ssh(guest)


def _machine(arguments: argparse.Namespace) -> Machine:
    nvdimms = [parse_nvdimm(text, slot=slot) for slot, text in enumerate(arguments.nvdimm)]
    words = [*arguments.append, *(["paprscm.console=shell"] if arguments.serial else [])]
    return Machine(nvdimms=tuple(nvdimms), cmdline=tuple(words))


def _script(environment: Environment, machine: Machine) -> str:
    equipment = environment.equipment
    folder = environment.settings.scratch_dir / "paprscm-by-hand"
    files = {n.slot: n.file or folder / f"nvdimm{n.slot}" for n in machine.nvdimms}
    board = machine.board(equipment.board)
    argv = qemu_argv(equipment.qemu, machine, board, equipment.payload, files, None)
    return script(argv, machine.nvdimms, files)


def _results(arguments: argparse.Namespace, chosen: Settings) -> int:
    return results.show(
        arguments.job,
        chosen,
        formats=arguments.wanted,
        output=arguments.output,
        build=arguments.build,
    )


def _submit(arguments: argparse.Namespace, chosen: Settings) -> int:
    return results.submit(
        arguments.job,
        chosen,
        arguments.to,
        project=arguments.project,
        build=arguments.build,
        wait_s=arguments.wait,
    )


def _rerun(arguments: argparse.Namespace, chosen: Settings) -> int:
    del chosen  # The job's settings count.
    return results.rerun(arguments.job, failed=arguments.failed, rest=arguments.rest)


def _branches(arguments: argparse.Namespace, chosen: Settings) -> int:
    del chosen
    tests = read_record(arguments.job).tests
    Console().print(branch_table(count_branches(tests)))
    return 0


def _reproduce(arguments: argparse.Namespace, chosen: Settings) -> int:
    del chosen  # Loading has checked them; an issue may have settings of its own.
    values = {name: getattr(arguments, name) for name in settings.names()}
    given = {name: value for name, value in values.items() if value is not None}
    issues = [read_issue(name) for name in arguments.issues]
    if arguments.all is not None:
        every = map(read_issue, known_issues.names())
        issues += [issue for issue in every if arguments.all in ("", issue.product)]
    if not issues:
        raise ConfigError("no known issue is named", hint="known_issues/README.md lists them")
    if len(issues) == 1:
        return reproduce.reproduce_one(given, issues[0])
    return reproduce.reproduce_many(given, issues)


def _report_issue(arguments: argparse.Namespace, chosen: Settings) -> int:
    issue = read_issue(arguments.issue)
    source = arguments.source
    if source is None and issue.product == "Linux":
        entry = kernel_source.find_source(Cache(chosen.cache_dir), chosen)
        source = entry / kernel_source.ARCHIVE if entry else None
    print(issue_report.render(issue, issue_report.read_maintainers(issue, source)), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
