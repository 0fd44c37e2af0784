"""The racing rule: end a trial when it is implausible that it is better than the best complete trial."""

from hpsearch.config import StudyConfig
from hpsearch.search.racing import Race


def make(config: StudyConfig) -> Race:
    """Return the pruner."""
    return Race()
