# SPDX-License-Identifier: GPL-2.0-or-later
"""The table of runs."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Create it."""
    op.create_table(
        "runs",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("started_s", sa.Double, nullable=False, index=True),
        sa.Column("imported_s", sa.Double, nullable=False),
        sa.Column("source", sa.Text, nullable=False),
        sa.Column("is_complete", sa.Boolean, nullable=False),
        sa.Column("verdicts", sa.Integer, nullable=False),
        sa.Column("kernel", sa.Text, nullable=False),
        sa.Column("qemu", sa.Text, nullable=False),
        sa.Column("host", sa.Text, nullable=False),
        sa.Column("suite", sa.Text, nullable=False),
        sa.Column("statuses", sa.Text, nullable=False),
        sa.Column("record", sa.LargeBinary, nullable=False),
    )
