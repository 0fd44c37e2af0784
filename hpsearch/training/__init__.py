"""Training of one fit: losses, metrics, schedule, checkpoints and training loop. Independent of folds and studies."""
