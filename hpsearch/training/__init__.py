"""One fit: losses, metrics, schedule, checkpoints and the loop. Knows nothing of folds or studies."""
