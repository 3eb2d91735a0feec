# SPDX-License-Identifier: GPL-2.0-or-later
"""Processes, cache, disk and memory of the host."""
