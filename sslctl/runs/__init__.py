"""Run directories: claiming one, checkpoints, the fingerprint, what was logged, and whether the run is healthy."""
