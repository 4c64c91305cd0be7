"""One page over one run or many: what was run, whether it is healthy, what came out, and how to repeat it."""
