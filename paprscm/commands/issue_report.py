# SPDX-License-Identifier: GPL-2.0-or-later
"""`paprscm report-issue`: print a known issue as the report that its project asks for.

Linux: a plain-text mail to maintainers and lists (Documentation/admin-guide/reporting-issues.rst).
QEMU: the sections of .gitlab/issue_templates/bug.md. Avocado: a description with its steps.
"""

from __future__ import annotations

import platform
import re
import tarfile
import textwrap
from collections.abc import Iterator
from pathlib import Path

from paprscm.commands.maintainers import Addresses, addresses
from paprscm.commands.standalone import standalone
from paprscm.errors import ConfigError
from paprscm.known_issues import SEVERITIES, SHARED, TRIGGERS, KnownIssue

_WIDTH = 72
"""Columns of a mail's text (Linux Documentation/process/email-clients.rst)."""

_SCRIPT = "reproduce.sh"
_LANGUAGES = {".c": "c", ".h": "c", ".sh": "sh", ".patch": "diff"}
"""Names of the languages of files, for Markdown."""

_HARMFUL = ("harm to the host", "loss of service")
_SECURITY = (
    "A guest triggers this issue. Read QEMU's security process before publishing it: "
    "https://www.qemu.org/contribute/security-process/"
)


def render(issue: KnownIssue, receivers: Addresses | None) -> str:
    """Return the report.

    Args:
        issue: the known issue.
        receivers: maintainers and lists; None: no source tree names them.
    """
    if issue.product == "Linux":
        return _mail(issue, receivers)
    return _bug(issue, receivers) if issue.product == "QEMU" else _plain_bug(issue)


def read_maintainers(issue: KnownIssue, source: Path | None) -> Addresses | None:
    """Addresses for an issue's source files; None without a source.

    Args:
        issue: the known issue.
        source: a source tree of the product, or a tar archive of one.

    Raises:
        ConfigError: the source has no MAINTAINERS.
    """
    if source is None:
        return None
    try:
        if source.is_dir():
            text = (source / "MAINTAINERS").read_text(encoding="utf-8")
        else:
            text = _from_archive(source)
    except (OSError, tarfile.TarError, KeyError) as error:
        raise ConfigError(
            f"{source} has no MAINTAINERS: {error}", hint=f"give a source tree of {issue.product}"
        ) from error
    return addresses(text, issue.files)


def _from_archive(archive: Path) -> str:
    """MAINTAINERS of a tar archive with one top folder."""
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.name.count("/") == 1 and member.name.endswith("/MAINTAINERS"):
                file = tar.extractfile(member)
                if file is not None:
                    return file.read().decode()
    raise KeyError("MAINTAINERS")


def subject(issue: KnownIssue) -> str:
    """Title with the prefix of its part of the product, as in the log of its source.

    Linux names the subsystem ("nvdimm: …"), QEMU the file ("hw/ppc/spapr_nvdimm: …").
    """
    file = Path(issue.files[0])
    if issue.product == "QEMU":
        return f"{file.with_suffix('')}: {issue.title}"
    parts = file.with_suffix("").parts
    return f"{parts[1] if len(parts) > 1 else parts[0]}: {issue.title}"


def _mail(issue: KnownIssue, receivers: Addresses | None) -> str:
    """A mail; files follow the text, as in a mail with inline attachments."""
    if receivers is None:
        heads = [f"To: (scripts/get_maintainer.pl -f {' '.join(issue.files)})"]
    else:
        heads = [f"To: {', '.join(receivers.people)}", f"Cc: {', '.join(receivers.lists)}"]
    heads += [f"Subject: [BUG] {subject(issue)}", ""]
    facts = [
        f"Versions: {_versions(issue)}",
        f"Location: {issue.location}",
        f"Effect: {_effect(issue)}",
        *_reported(issue),
        f"Reproduction: {_steps(issue)}",
        *([f"Fix: {issue.section('Fix')}"] if issue.section("Fix") else []),
    ]
    body = plain("\n\n".join([issue.description, *facts]))
    files = [f"---- {name} ----\n{text}" for name, text in _files(issue)]
    return "\n".join([*heads, body, "", *files])


def _bug(issue: KnownIssue, receivers: Addresses | None) -> str:
    """An entry of QEMU's tracker, which renders Markdown."""
    heads = [f"Title: {subject(issue)}"]
    if receivers is not None:
        heads.append(f"Cc: {', '.join([*receivers.people, *receivers.lists])}")
    if issue.trigger.startswith("guest") and issue.severity in _HARMFUL:
        heads.append(f"Note: {_SECURITY}")
    guest = "a program of a few lines that makes hypervisor calls (below)"
    if issue.script is None or issue.script.name == "guest.sh":
        guest = "Linux"
    elif not _has_program(issue):
        guest = "none"
    # Most maintainers can run x86.
    x86 = "qemu-system-x86_64" in issue.section("Reproduce")
    command = "the script prints it" if issue.script is not None else "in the steps"
    fixes = _reported(issue)
    if issue.section("Fix"):
        fixes.append(without_links(issue.section("Fix")))
    return "\n".join(
        [
            *heads,
            "",
            "## Host environment",
            f" - Operating system: {_operating_system()}",
            f" - OS/kernel version: {platform.release()}",
            f" - Architecture: {platform.machine()}",
            f" - QEMU flavor: qemu-system-ppc64{' and qemu-system-x86_64' * x86}",
            f" - QEMU version: {_versions(issue)}",
            f" - QEMU command line: {command}",
            "",
            "## Emulated/Virtualized environment",
            f" - Operating system: {guest}",
            f" - Architecture: ppc64, machine pseries{'; x86_64, machine q35' * x86}",
            "",
            "## Description of problem",
            without_links(issue.description),
            "",
            f"Location: {issue.location}",
            "",
            f"Effect: {_effect(issue)}",
            "",
            "## Steps to reproduce",
            without_links(_steps(issue)),
            "",
            *_fenced(issue),
            "## Additional information",
            "### Fix",
            "\n\n".join(fixes) or "No fix is known.",
            "",
        ]
    )


def _plain_bug(issue: KnownIssue) -> str:
    facts = [
        f"Version: {_versions(issue)}",
        f"Location: {issue.location}",
        f"Effect: {_effect(issue)}",
        f"## Steps to reproduce\n\n{_steps(issue)}",
        f"## Fix\n\n{issue.section('Fix')}",
    ]
    text = "\n\n".join([f"Title: {issue.title}", issue.description, *facts])
    return "\n".join([without_links(text), "", *_fenced(issue)])


def _versions(issue: KnownIssue) -> str:
    since = ", ".join(map(str, issue.since))
    fixed = ", ".join(map(str, issue.fixed_in))
    return f"{issue.product} since {since}; seen in {issue.seen_in}" + (
        f"; fixed in {fixed}" if fixed else ""
    )


def _effect(issue: KnownIssue) -> str:
    meaning, trigger = SEVERITIES[issue.severity], TRIGGERS[issue.trigger]
    return f"{issue.severity} ({meaning}); triggered by {trigger}"


def _reported(issue: KnownIssue) -> list[str]:
    """Earlier reports and fixes; empty if the project does not know the issue."""
    text = issue.reported
    return [] if text == "not yet" else [text[0].upper() + text[1:]]


def _has_program(issue: KnownIssue) -> bool:
    return any(file.suffix == ".c" for file in issue.attachments)


def _steps(issue: KnownIssue) -> str:
    """Command that runs the script of the report, or the steps of the issue's file."""
    if issue.script is None:
        return issue.section("Reproduce")
    end = (
        "It exits with 1 if it shows the issue, with 0 if it is gone, and with 2 if it cannot tell."
    )
    if issue.script.name == "host.sh":
        run = f"sh PATH/{_SCRIPT}"
        if issue.product == "QEMU":
            run = f"QEMU=PATH/qemu-system-ppc64 {run}"
        needs = re.findall(r"^need (.+)$", issue.script.read_text(), re.MULTILINE)
        needs += ["powerpc64le-linux-gnu-gcc (or $CC)"] * _has_program(issue)
        parts = [
            f"Save the files below to one folder, and in an empty folder run `{run}`. {end}",
            *([f"It needs {' and '.join(needs)}."] if needs else []),
            _account(issue, run),
        ]
        return "\n\n".join(parts)
    return (
        f"Save the files below to one folder, and as root run `sh {_SCRIPT} REGION` on a machine "
        "with persistent memory, such as a pseries guest with a spapr-nvdimm "
        f"({' and '.join(issue.machine)}). REGION is its name in /sys/bus/nd/devices; its data are "
        f"overwritten. {end}"
    )


def _account(issue: KnownIssue, run: str) -> str:
    """What the script does, from the issue's file: without the suite's command and its tests.

    Args:
        issue: an issue whose section Reproduce begins with the command `paprscm reproduce`.
        run: command that runs the script of the report.
    """
    text = issue.section("Reproduce").partition("\n\n")[2]
    text = re.sub(r"^Test: .+(?:\n.+)*", "", text, flags=re.MULTILINE).strip()
    text = re.sub(r"`(QEMU=\S+) sh known_issues/\S+`", rf"`\1 {run.partition(' ')[2]}`", text)
    return f"The script {text.removeprefix('It ')}"


def _files(issue: KnownIssue) -> Iterator[tuple[str, str]]:
    """Names and texts of the files that belong to the report, for one folder.

    The issue's own programs come first: they are short, and the rest is long.
    """
    for file in sorted(issue.attachments, key=lambda f: (f.name in SHARED, f == issue.script)):
        text = file.read_text()
        if file == issue.script:
            text = standalone(text, (issue.folder.parent / "lib.sh").read_text())
            yield _SCRIPT, text.replace(file.name, _SCRIPT)
        elif file.name != "lib.sh":
            yield file.name, text.replace('"../bare.h"', '"bare.h"')
    if issue.patch is not None:
        yield issue.patch.name, issue.patch.read_text()


def _fenced(issue: KnownIssue) -> list[str]:
    """The files of the report, in Markdown."""
    return [
        f"{name}:\n\n```{_LANGUAGES.get(Path(name).suffix, '')}\n{text.rstrip()}\n```\n"
        for name, text in _files(issue)
    ]


def _operating_system() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except OSError:
        return platform.system()


def without_links(text: str) -> str:
    """Replace [text](target) by its text: the targets are files of the suite.

    A remark in parentheses that only names another known issue is removed.
    """
    text = re.sub(r"\s*\((?:see\s+)?\[[^\]]+\]\([^)]+\.md\)\)", "", text)
    return re.sub(r"\[([^\]]+)\]\([^)]+\)", r"\1", text)


def plain(text: str) -> str:
    """Markdown as the text of a mail: wrapped, without links and code marks, but for code."""
    paragraphs = []
    for paragraph in without_links(text).split("\n\n"):
        if paragraph.startswith(("    ", "- ", "|")):
            paragraphs.append(paragraph)
        else:
            words = paragraph.replace("`", "")
            paragraphs.append(textwrap.fill(words, _WIDTH, break_on_hyphens=False))
    return "\n\n".join(paragraphs)
