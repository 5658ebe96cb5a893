"""From shard sets to what the model is fed: the order (lanes), mixtures, and clips filled into packs."""
