"""Compute the statistics of a study: best trial, intervals, run-to-run variance, selection bias.

This package depends only on NumPy and SciPy.
"""
