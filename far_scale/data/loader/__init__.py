"""From shard sets to the model's input: sample order (lanes), mixtures, packing, loading and prefetch."""
