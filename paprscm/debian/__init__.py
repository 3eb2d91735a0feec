# SPDX-License-Identifier: GPL-2.0-or-later
"""What Debian's packages give: the userland, kernel sources, and tools of this host."""
