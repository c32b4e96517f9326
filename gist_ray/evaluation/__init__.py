"""From a model folder to a report: pool, mteb_encoder, tasks, run, compare, report."""
