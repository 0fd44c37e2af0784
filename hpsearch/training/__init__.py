"""One fit: losses, metrics, schedule, checkpoints and the training loop. Independent of folds and studies."""
