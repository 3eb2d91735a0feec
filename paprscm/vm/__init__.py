# SPDX-License-Identifier: GPL-2.0-or-later
"""One QEMU: capabilities, command line, process, monitor, flush shim."""
