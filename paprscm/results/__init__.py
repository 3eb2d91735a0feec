# SPDX-License-Identifier: GPL-2.0-or-later
"""One record per job: written, read, counted, and printed."""
