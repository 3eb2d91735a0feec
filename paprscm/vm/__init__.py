# SPDX-License-Identifier: GPL-2.0-or-later
"""One QEMU process: the machine, its command line, backing files and flush shim."""
