"""From images to batches: sources, shards, the order of samples, verified reading."""
