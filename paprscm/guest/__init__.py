# SPDX-License-Identifier: GPL-2.0-or-later
"""One running Linux guest: boot or restore, console, ssh, guest tools."""
