# SPDX-License-Identifier: GPL-2.0-or-later
"""The script of a reproduction without known_issues/lib.sh: for a report, which is one text."""

from __future__ import annotations

import re

_SOURCED = '. "$(dirname "$0")/../lib.sh"\n'
# Where a shell expects a command, and `steps=COMMAND`; not inside a message.
_COMMAND = r"(?:^|[;|&(){!]|\b(?:if|then|else|do|while|until)\b|steps=)[ \t]*"
_COMMENT = re.compile(r"^\s*#.*$", re.MULTILINE)


def standalone(script: str, library: str) -> str:
    """Replace the line that reads lib.sh by the parts of lib.sh that the script needs.

    Args:
        script: text of the script.
        library: text of lib.sh. Blank lines separate its parts; each is one function, or commands
            that set variables, with a comment.
    """
    parts = [part for part in library.split("\n\n") if _COMMENT.sub("", part).strip()]
    wanted = _needed(script, parts)
    return script.replace(_SOURCED, "\n" + "\n\n".join(p for p in parts if p in wanted) + "\n")


def _needed(script: str, parts: list[str]) -> set[str]:
    """The parts that the script uses, or another needed part."""
    wanted: set[str] = set()
    texts = [script]
    while texts:
        words = _COMMENT.sub("", texts.pop())
        for part in parts:
            functions = re.findall(r"^(\w+)\(\)", part, re.MULTILINE)
            # The variables of a part without a function.
            names = [] if functions else re.findall(r"^(\w+)=", part, re.MULTILINE)
            used = [rf"{_COMMAND}{name}\b" for name in functions]
            used += [rf"\$\{{?{name}\b" for name in names]
            if part not in wanted and any(re.search(one, words, re.MULTILINE) for one in used):
                wanted.add(part)
                texts.append(part)
    return wanted
