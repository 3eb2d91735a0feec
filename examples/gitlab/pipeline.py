#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Print a child pipeline of GitLab with a job for each cell of a matrix, and one that merges them.

In .gitlab-ci.yml:

    cells:
      script:
        - paprscm matrix list --json matrix.toml > cells.json
        - examples/gitlab/pipeline.py matrix.toml < cells.json > cells.yml
      artifacts: { paths: [cells.yml] }
    matrix:
      needs: [cells]
      trigger: { include: [{ artifact: cells.yml, job: cells }], strategy: depend }
"""

import json
import sys


def pipeline(document, file):
    """The pipeline of a `paprscm matrix list --json`; JSON is YAML."""
    jobs = {"stages": ["cells", "merge"]}
    for cell in document["cells"]:
        jobs[cell["id"]] = {
            "stage": "cells",
            "script": [f"paprscm matrix run {file} --cell {cell['id']} --output matrix"],
            "retry": {"max": 1, "when": ["runner_system_failure", "stuck_or_timeout_failure"]},
            "artifacts": {"when": "always", "paths": ["matrix/"], "expire_in": "4 weeks"},
        }
    jobs["merge"] = {
        "stage": "merge",
        "when": "always",
        "script": [f"paprscm matrix merge matrix --file {file} --output matrix"],
        "artifacts": {"when": "always", "paths": ["matrix/grid.html", "matrix/durations.json"]},
    }
    return jobs


if __name__ == "__main__":
    print(json.dumps(pipeline(json.load(sys.stdin), sys.argv[1]), indent=2))
