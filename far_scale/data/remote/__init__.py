"""Remote shard sets: fetching their files, and the node's cache."""
