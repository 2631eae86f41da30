"""Training: one step, and the loop of steps that is a run."""
