# SPDX-License-Identifier: GPL-2.0-or-later
"""Static site about many jobs: verdicts over time, changes, known issues, metrics."""
