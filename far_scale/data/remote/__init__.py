"""Shard sets that lie far away: fetching them, and the cache of a node."""
