"""Training of a single network (a fit), independent of folds and studies: losses, metrics, checkpoints, loop."""
