"""Real clients; a package, so that its tests share one endpoint and it stops before the next tests start."""
