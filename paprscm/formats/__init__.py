# SPDX-License-Identifier: GPL-2.0-or-later
"""A job's record in the formats of other systems, and its way to them."""
