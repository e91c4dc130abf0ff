"""Reversible bases."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "bases",
        sa.Column("id", sa.String, primary_key=True),
        sa.Column("base_model", sa.String, nullable=False),
        sa.Column("tasks", sa.JSON, nullable=False),
        sa.Column("modules", sa.Integer, nullable=False),
        sa.Column("size_bytes", sa.BigInteger, nullable=False),
        sa.Column("recipe", sa.String, nullable=False),
        sa.Column("restricted", sa.JSON, nullable=False),
        sa.Column("created_at", sa.Float, nullable=False),
    )


def downgrade() -> None:
    op.drop_table("bases")
