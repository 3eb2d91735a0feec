# SPDX-License-Identifier: GPL-2.0-or-later
"""Let Avocado read the suite's avocado.cfg and ./avocado.cfg, in the job and in every test.

Avocado reads ./avocado.cfg only with --config, and then only in the job's process. A settings
plugin runs in all processes. It must not import avocado.core.settings: that module is being
initialized when the plugin is loaded, and Avocado silently drops a plugin that fails to load.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from avocado.core.plugin_interfaces import Settings

from paprscm.paths import AVOCADO_CFG, SUITE_VARIABLE
from paprscm.plugins import fork_server


class ProjectSettings(Settings):
    """Adds the suite's avocado.cfg and that of the working directory to Avocado's files."""

    def adjust_settings_paths(self, paths: list[str]) -> None:
        """Append them; the later one overrides. In a checkout they are the same file."""
        files = [AVOCADO_CFG] if SUITE_VARIABLE in os.environ else []
        files.append(Path("avocado.cfg").resolve())
        present = [str(file) for file in dict.fromkeys(files) if file.is_file()]
        paths.extend(present)
        if present and Path(sys.argv[0]).name == "avocado" and {"run", "list"} & {*sys.argv}:
            # Needed soon; its imports run while Avocado's do.
            fork_server.start()
