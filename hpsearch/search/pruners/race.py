"""Racing rule: prune a trial that is unlikely to be better than the best complete trial."""

from hpsearch.config import StudyConfig
from hpsearch.search.racing import Race


def make(config: StudyConfig) -> Race:
    """Return the pruner."""
    return Race()
