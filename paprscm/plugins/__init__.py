# SPDX-License-Identifier: GPL-2.0-or-later
"""Entry points of Avocado."""
