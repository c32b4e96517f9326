"""From text triplets to shards: sources, prepare, shards, plan."""
