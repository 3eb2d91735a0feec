# SPDX-License-Identifier: GPL-2.0-or-later
"""One running Linux guest: booted or restored, its DIMMs' contents, and programs in it."""
