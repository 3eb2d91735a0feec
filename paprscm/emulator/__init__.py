# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMU's binary: found, fetched or built, asked what it can do, and its protocols."""
