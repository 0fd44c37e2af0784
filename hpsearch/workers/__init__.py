"""Jobs, the processes that run them, and the pool that hands them out."""
