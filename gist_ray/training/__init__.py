"""From shards to a checkpoint: loss, collectives, engine, loop, checkpoint, run."""
