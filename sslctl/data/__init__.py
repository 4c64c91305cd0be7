"""What images there are, which ones a step takes, and how they get there."""
