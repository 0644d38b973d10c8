"""Training images: one schema, read from parquet shards or built from the publishers' own folders."""
