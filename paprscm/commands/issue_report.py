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
from paprscm.known_issues import SEVERITIES, TRIGGERS, KnownIssue

_WIDTH = 72
"""Columns of a mail's text (Linux Documentation/process/email-clients.rst)."""

_SCRIPT = "reproduce.sh"
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
    if issue.trigger == "guest kernel":
        heads.append(f"Note: {_SECURITY}")
    guest = "a program of a few lines that makes hypervisor calls (below)"
    if issue.script is None or issue.script.name == "guest.sh":
        guest = "Linux"
    elif not any(file.suffix == ".c" for file in issue.attachments):
        guest = "none"
    fixes = [] if issue.reported == "not yet" else [issue.reported[0].upper() + issue.reported[1:]]
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
            " - QEMU flavor: qemu-system-ppc64",
            f" - QEMU version: {_versions(issue)}",
            " - QEMU command line: "
            + ("the script prints it" if issue.script is not None else "in the steps"),
            "",
            "## Emulated/Virtualized environment",
            f" - Operating system: {guest}",
            " - Architecture: ppc64, machine pseries",
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


def _steps(issue: KnownIssue) -> str:
    """Command that runs the script of the report, or the steps of the issue's file."""
    if issue.script is None:
        return issue.section("Reproduce")
    end = "It exits with 1 if it shows the issue, and with 0 if the issue is gone."
    if issue.script.name == "host.sh":
        emulator = "QEMU=PATH/qemu-system-ppc64 " if issue.product == "QEMU" else ""
        return (
            "Save the files below to one folder, and in an empty folder run "
            f"`{emulator}sh PATH/{_SCRIPT}`. {end}\n\n{_about(issue, issue.script)}"
        )
    return (
        f"Save the files below to one folder, and as root run `sh {_SCRIPT} REGION` on a machine "
        "with persistent memory, such as a pseries guest with a spapr-nvdimm "
        f"({' and '.join(issue.machine)}). REGION is its name in /sys/bus/nd/devices; its data are "
        f"overwritten. {end}"
    )


def _about(issue: KnownIssue, script: Path) -> str:
    """Commands that host.sh needs, and the text about it, without those of the suite."""
    needs = re.findall(r"^need (.+)$", script.read_text(), re.MULTILINE)
    if any(file.suffix == ".c" for file in issue.attachments):
        needs.append("powerpc64le-linux-gnu-gcc (or $CC)")
    text = issue.section("Reproduce").partition("\n\n")[2].partition("\nTest: ")[0]
    text = text.replace(f"known_issues/{issue.name}/{script.name}", _SCRIPT).strip()
    needed = f"It needs {' and '.join(needs)}.\n\n" if needs else ""
    return f"{needed}The script {text.removeprefix('It ')}"


def _files(issue: KnownIssue) -> Iterator[tuple[str, str]]:
    """Names and texts of the files that belong to the report, for one folder."""
    for file in issue.attachments:
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
    return [f"{name}:\n\n```\n{text.rstrip()}\n```\n" for name, text in _files(issue)]


def _operating_system() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except OSError:
        return platform.system()


def without_links(text: str) -> str:
    """Replace [text](target) by its text, and omit (see [text](target)): files of the suite."""
    text = re.sub(r"\s*\((?:see )?\[[^\]]+\]\([^)]+\.md\)\)", "", text)
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
