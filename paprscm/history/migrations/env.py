# SPDX-License-Identifier: GPL-2.0-or-later
"""Alembic's entry point: migrate the connection that database.py passes, in its transaction."""

from __future__ import annotations

from alembic import context

from paprscm.history.tables import METADATA, VERSION_TABLE

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=METADATA,
    version_table=VERSION_TABLE,
    # SQLite's own, too, because database.py begins transactions itself.
    transactional_ddl=True,
)
with context.begin_transaction():
    context.run_migrations()
