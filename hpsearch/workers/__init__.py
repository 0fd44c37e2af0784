"""Jobs, the worker processes that run them, and the pool that assigns jobs to workers."""
