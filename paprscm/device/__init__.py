# SPDX-License-Identifier: GPL-2.0-or-later
"""Judge QEMU without a guest: command lines, refusals and the device tree."""
