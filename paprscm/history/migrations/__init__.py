# SPDX-License-Identifier: GPL-2.0-or-later
"""Versions of the database's schema, applied by Alembic."""
