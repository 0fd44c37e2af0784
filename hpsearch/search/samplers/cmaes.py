"""Covariance matrix adaptation evolution strategy (Hansen and Ostermeier, 2001)."""

from optuna.samplers import CmaEsSampler

from hpsearch.config import StudyConfig

IS_REPLAYED = True
IS_NUMERIC = True


def make(config: StudyConfig, seed: int) -> CmaEsSampler:
    """Return the sampler. Its first `study.startup_trials` trials are random."""
    return CmaEsSampler(seed=seed, n_startup_trials=config.study.startup_trials, warn_independent_sampling=False)
