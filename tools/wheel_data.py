# SPDX-License-Identifier: GPL-2.0-or-later
"""Hatchling's build hook: put what the installed suite needs into the wheel as paprscm/data.

An editable install uses the checkout (paprscm/paths.py), so it gets no copies.
"""

from __future__ import annotations

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_DATA = ("avocado.cfg", "guest_tools", "host_tools", "images", "known_issues", "tests")


class WheelData(BuildHookInterface):  # type: ignore[type-arg]
    """Adds files and folders of the checkout to a wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add them unless the wheel is that of an editable install."""
        if version == "standard":
            build_data["force_include"].update({name: f"paprscm/data/{name}" for name in _DATA})
