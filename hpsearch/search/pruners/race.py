"""Pruner of the racing rule (`search.racing`)."""

from hpsearch.config import StudyConfig
from hpsearch.search.racing import Race


def make(config: StudyConfig) -> Race:
    """Return the pruner."""
    return Race()
