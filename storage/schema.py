"""The tables. Migrations create them; a test compares the two, so neither can drift."""

from sqlalchemy import JSON, BigInteger, Column, Float, Integer, MetaData, String, Table

metadata = MetaData()

adapters = Table(
    "adapters",
    metadata,
    Column("id", String, primary_key=True),
    Column("base_model", String, nullable=False),
    Column("modules", Integer, nullable=False),
    Column("rank", Integer, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("source_kind", String, nullable=False),
    Column("source", String, nullable=False, index=True),
    Column("licence", String),
    Column("restricted", JSON, nullable=False),
    Column("created_at", Float, nullable=False),
)

bases = Table(
    "bases",
    metadata,
    Column("id", String, primary_key=True),
    Column("base_model", String, nullable=False),
    Column("tasks", JSON, nullable=False),
    Column("modules", Integer, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("recipe", String, nullable=False),
    Column("restricted", JSON, nullable=False),
    Column("created_at", Float, nullable=False),
)

lineage = Table(
    "lineage",
    metadata,
    Column("child", String, primary_key=True),
    Column("position", Integer, primary_key=True),
    Column("parent", String, nullable=False, index=True),
)

names = Table("names", metadata, Column("name", String, primary_key=True), Column("target", String, nullable=False))

name_requests = Table(
    "name_requests",
    metadata,
    Column("recipe", String, primary_key=True),
    Column("name", String, primary_key=True),
)

results = Table(
    "results",
    metadata,
    Column("recipe", String, primary_key=True),
    Column("kind", String, nullable=False),
    Column("target", String, nullable=False, index=True),
    Column("created_at", Float, nullable=False),
)

jobs = Table(
    "jobs",
    metadata,
    Column("id", String, primary_key=True),
    Column("attempt", Integer, nullable=False),
    Column("state", String, nullable=False, index=True),
    Column("method", String, nullable=False),
    Column("stage", String, nullable=False),
    Column("done", Integer, nullable=False),
    Column("total", Integer, nullable=False),
    Column("error", JSON),
    Column("recipe", JSON, nullable=False),
    Column("created_at", Float, nullable=False, index=True),
    Column("finished_at", Float),
)

job_events = Table(
    "job_events",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=True),
    Column("job", String, nullable=False, index=True),
    Column("attempt", Integer, nullable=False),
    Column("event", String, nullable=False),
    Column("stage", String, nullable=False),
    Column("done", Integer, nullable=False),
    Column("total", Integer, nullable=False),
    Column("at", Float, nullable=False),
)

shards = Table(
    "shards",
    metadata,
    Column("recipe", String, primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("digest", String, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("media_type", String, nullable=False),
)

data_files = Table(
    "data_files",
    metadata,
    Column("id", String, primary_key=True),
    Column("kind", String, nullable=False),
    Column("rows", BigInteger, nullable=False),
    Column("columns", JSON, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("restricted", JSON, nullable=False),
    Column("source", String, nullable=False, index=True),
    Column("created_at", Float, nullable=False),
)

base_models = Table(
    "base_models",
    metadata,
    Column("id", String, primary_key=True),
    Column("source", String, nullable=False, index=True),
    Column("size_bytes", BigInteger, nullable=False),
    Column("restricted", JSON, nullable=False),
    Column("created_at", Float, nullable=False),
)

checkpoints = Table(
    "checkpoints",
    metadata,
    Column("recipe", String, primary_key=True),
    Column("digest", String, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("media_type", String, nullable=False),
)
