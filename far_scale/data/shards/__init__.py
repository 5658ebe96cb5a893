"""Shard sets: their files, what is known of them, writing, reading, checking and converting them."""
