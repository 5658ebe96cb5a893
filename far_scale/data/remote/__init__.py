"""Shard sets that lie far away: fetching, the node's cache, and what is fetched ahead."""
