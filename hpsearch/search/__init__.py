"""Search: suggestions, pruning, replicates, the coordinator's loop."""
