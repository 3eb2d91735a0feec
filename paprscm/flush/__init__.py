# SPDX-License-Identifier: GPL-2.0-or-later
"""Judge H_SCM_FLUSH: load, trace, accounts, durability."""
