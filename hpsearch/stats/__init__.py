"""Statistics of a study: best trial, intervals, run-to-run variance, selection bias. Knows numpy and scipy only."""
