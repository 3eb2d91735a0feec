# SPDX-License-Identifier: GPL-2.0-or-later
"""The table of verdicts."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Create it."""
    op.create_table(
        "verdicts",
        sa.Column("run", sa.Text, sa.ForeignKey("runs.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("number", sa.Integer, primary_key=True),
        sa.Column("test", sa.Text, nullable=False),
        sa.Column("status", sa.Text, nullable=False),
        sa.Column("conditions", sa.Text, nullable=False),
    )
