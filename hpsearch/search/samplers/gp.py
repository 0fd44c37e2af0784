"""Gaussian process with expected improvement, as implemented in Optuna."""

from optuna.samplers import GPSampler

from hpsearch.config import StudyConfig


def make(config: StudyConfig, seed: int) -> GPSampler:
    """Return the sampler. Its first `study.startup_trials` trials are random."""
    return GPSampler(seed=seed, n_startup_trials=config.study.startup_trials, warn_independent_sampling=False)
