# SPDX-License-Identifier: GPL-2.0-or-later
"""Folders of the project's files, in a checkout and in an installed package."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_CHECKOUT = _PACKAGE.parent

ROOT = _CHECKOUT if (_CHECKOUT / "guest_tools").is_dir() else _PACKAGE / "data"
"""The checkout; in a wheel, the copies of its folders made by tools/wheel_data.py."""

GUEST_TOOLS = ROOT / "guest_tools"
HOST_TOOLS = ROOT / "host_tools"
IMAGES = ROOT / "images"
KNOWN_ISSUES = ROOT / "known_issues"
TESTS = ROOT / "tests"
AVOCADO_CFG = ROOT / "avocado.cfg"
"""Avocado settings that a run of the suite requires."""

SUITE_VARIABLE = "PAPRSCM_SUITE"
"""Environment variable with which Avocado reads AVOCADO_CFG in any folder."""
