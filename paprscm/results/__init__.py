# SPDX-License-Identifier: GPL-2.0-or-later
"""One record per job, and its formats for CI systems, dashboards and people."""
