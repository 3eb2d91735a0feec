# SPDX-License-Identifier: GPL-2.0-or-later
"""Build a guest's kernel and initramfs."""
