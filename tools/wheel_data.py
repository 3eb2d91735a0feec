# SPDX-License-Identifier: GPL-2.0-or-later
"""Build hook of Hatchling: add the data files of the installed suite to the wheel as paprscm/data.

An editable install reads the checkout (paprscm/paths.py), so it does not get copies.
"""

from __future__ import annotations

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_DATA = ("avocado.cfg", "guest_tools", "host_tools", "images", "known_issues", "tests")


class WheelData(BuildHookInterface):  # type: ignore[type-arg]
    """Adds the data files of the checkout to a wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add the files, except to the wheel of an editable install."""
        if version == "standard":
            build_data["force_include"].update({name: f"paprscm/data/{name}" for name in _DATA})
