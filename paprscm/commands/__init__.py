# SPDX-License-Identifier: GPL-2.0-or-later
"""The `paprscm` command, one module for each verb."""
