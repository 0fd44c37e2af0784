"""Tree-structured Parzen estimator, multivariate (Bergstra et al., NeurIPS 2011)."""

from optuna.samplers import TPESampler

from hpsearch.config import StudyConfig


def make(config: StudyConfig, seed: int) -> TPESampler:
    """Return the sampler. Its first `study.startup_trials` trials are random."""
    return TPESampler(seed=seed, n_startup_trials=config.study.startup_trials, multivariate=True, constant_liar=True)
