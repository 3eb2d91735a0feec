# SPDX-License-Identifier: GPL-2.0-or-later
"""From Debian's packages: the guest's userland, kernel sources, and build tools."""
