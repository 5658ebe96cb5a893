"""From videos to packs: shard sets (manifest, shards), their order (lanes), and what the model is fed (packs)."""
