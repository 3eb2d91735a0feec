# SPDX-License-Identifier: GPL-2.0-or-later
"""Linux's drivers of a DIMM: their commands, failures and removal."""
