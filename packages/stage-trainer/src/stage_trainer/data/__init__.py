"""What a step learns from: the sampler's order, shards here or elsewhere, and the batches made of them."""
