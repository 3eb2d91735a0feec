# SPDX-License-Identifier: GPL-2.0-or-later
"""Judge the data that survive the sudden end of QEMU."""
