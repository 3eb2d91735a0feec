# SPDX-License-Identifier: GPL-2.0-or-later
"""Regions, namespaces and file systems as Linux reports them."""
