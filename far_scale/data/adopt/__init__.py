"""Adoption of shards that others wrote: which they are, how their samples are read, and their indexes."""
