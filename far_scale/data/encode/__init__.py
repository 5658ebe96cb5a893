"""Encoding of videos to shard sets, by any number of processes and tasks."""
