# SPDX-License-Identifier: GPL-2.0-or-later
"""Put ./avocado.cfg in force for Avocado, in the job's process and in every test's.

Avocado reads ./avocado.cfg only when told with --config, and then only in the job's process. A
settings plugin runs in all of them. It must not import avocado.core.settings: that module is just
being made when the plugin is loaded, and Avocado drops a plugin that fails to load in silence.
"""

from __future__ import annotations

from pathlib import Path

from avocado.core.plugin_interfaces import Settings


class ProjectSettings(Settings):
    """Adds the avocado.cfg of the working directory to the files that Avocado reads."""

    def adjust_settings_paths(self, paths: list[str]) -> None:
        """Append it, so that it has the last word among the files."""
        project = Path("avocado.cfg").resolve()
        if project.is_file():
            paths.append(str(project))
