"""A cluster without engines: the live policies, reports and accounting over the engine model, in discrete events."""
