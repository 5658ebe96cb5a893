"""From shard sets to what the model is fed: the order (lanes), mixtures, fetching ahead, clips filled into packs."""
