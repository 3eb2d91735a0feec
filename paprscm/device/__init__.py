# SPDX-License-Identifier: GPL-2.0-or-later
"""Judge QEMU without a guest kernel: command lines, device tree, hcalls."""
