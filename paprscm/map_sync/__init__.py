# SPDX-License-Identifier: GPL-2.0-or-later
"""Judge MAP_SYNC: probe, verdict, mmap flags, page faults."""
