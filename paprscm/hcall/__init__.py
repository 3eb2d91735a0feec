# SPDX-License-Identifier: GPL-2.0-or-later
"""Hypervisor calls: made without Linux and judged by a model, or answered in QEMU's place."""
