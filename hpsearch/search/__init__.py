"""Search for the best configuration: suggestions, pruning, replicates, and the coordinator that runs them."""
