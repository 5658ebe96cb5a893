"""Adoption of shards from other programs: finding them, detecting their format, and indexing them."""
