"""Random search."""

from optuna.samplers import RandomSampler

from hpsearch.config import StudyConfig


def make(config: StudyConfig, seed: int) -> RandomSampler:
    """Return the sampler."""
    return RandomSampler(seed=seed)
