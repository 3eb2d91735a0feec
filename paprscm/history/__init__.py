# SPDX-License-Identifier: GPL-2.0-or-later
"""Many runs: their database, comparisons of sets of runs, change points."""
