# SPDX-License-Identifier: GPL-2.0-or-later
"""Reads the pages and the data of a site, for selftests."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

VOID = {"meta", "link", "img", "input", "br"}


class Page(HTMLParser):
    """Elements of a page, in order; checks that they are balanced."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        assert not data.strip() or self._open[-1] not in ("script", "style")

    def values(self, name: str) -> list[str]:
        return [attributes[name] for _, attributes in self.elements if name in attributes]


def data(file: Path) -> Any:
    """The value in a file of data/, which is a script that passes it to the page."""
    match = re.fullmatch(r'paprscm\.load\("(\w+)",(.*)\);\n', file.read_text(encoding="ascii"))
    assert match and "<" not in match[2], file
    return json.loads(match[2])


def text_of(file: Path) -> str:
    """The text of a page, with single spaces."""
    return " ".join(" ".join(Page(file.read_text()).texts).split())
