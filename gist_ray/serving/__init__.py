"""From a model folder to an endpoint: engine, scheduler, schema, api, app."""
