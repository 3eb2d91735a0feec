# SPDX-License-Identifier: GPL-2.0-or-later
"""Label areas and info blocks of DIMMs, and the namespaces that fit into them."""
