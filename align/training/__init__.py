"""One trainer under every method: the step, its guards, its checkpoints."""
