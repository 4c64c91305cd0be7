"""Training: the plan, the one loop, and what it stands on."""
