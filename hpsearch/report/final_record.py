"""The content of final.json, the result of `hpsearch final`."""

from dataclasses import dataclass, field
from typing import Any, Self

from hpsearch.data.duplicates import DuplicatePair
from hpsearch.errors import RecordError
from hpsearch.inference.postprocessing import SelectedPostprocessing
from hpsearch.paths import FinalPaths, read_json
from hpsearch.stats.intervals import Interval, Paired
from hpsearch.stats.selection import Corrected
from hpsearch.store.trials import FORMAT
from hpsearch.typed_json import from_json


@dataclass(frozen=True, kw_only=True)
class EnsembleResult:
    """The ensemble of the fold networks, compared with the network that was trained on the whole pool."""

    n_networks: int
    test: dict[str, Interval]
    """As in `FinalScores.chosen_test`: with the selected post-processing, if there is any."""
    official: dict[str, Interval]
    gain: Paired
    """Gain in the study's metric over the retrained network, on the same test images at the size of the search."""


@dataclass(frozen=True, kw_only=True, eq=False)
class StoredScores:
    """Test scores of a retrained configuration; version 0.1 recorded only some of them."""

    n_pool: int
    """Number of pool images that the networks were trained on."""
    n_test: int
    """Number of test images."""
    test: dict[str, Interval]
    """Score by name at the size of the search: mean over images, and over seeds, with its 95 % interval over images.
    Scored as all trials are: threshold 0.5, no test-time augmentation, no cleaning."""
    official: dict[str, Interval] = field(default_factory=dict)
    """Official score by name, at each image's own resolution, of the network that is kept (the first seed's) with its
    post-processing. Mean over images with its 95 % interval; empty if they were not computed."""
    chosen: SelectedPostprocessing | None = None
    """Post-processing selected on out-of-fold predictions; None if no fold networks were kept."""
    chosen_test: dict[str, Interval] = field(default_factory=dict)
    """Like `test`, of the network that is kept, with the selected post-processing; empty if there is none."""
    ensemble: EnsembleResult | None = None
    """The ensemble of the fold networks; None unless it was asked for."""
    leaks: tuple[DuplicatePair, ...] = ()
    """Duplicates and near-duplicates with one image in the pool and one in the test split."""
    without_leaks: float | None = None
    """Mean of the study's metric over the test images without duplicates; None without leaks, or if all have one."""


@dataclass(frozen=True, kw_only=True)
class FinalRecord(StoredScores):
    """What final.json holds. `FinalResult` describes fields of the same names.

    Files of version 0.1 may lack the fields with defaults.
    """

    study: str
    trial: int
    params: dict[str, Any]
    metric: str
    n_seeds: int
    began_at: float
    ended_at: float
    test_key: str
    """Key of the cache of the test images."""
    runtime: dict[str, Any]
    """The machine."""
    cv: Interval
    cv_fold_std: float
    per_seed: dict[str, tuple[float, ...]]
    against_default: Paired | None
    format: int = FORMAT
    pool_key: str = ""
    winner: int | None = None
    is_confirmed: bool = False
    corrected: Corrected | None = None
    predicted: Interval | None = None
    eval_size: tuple[int, int] | None = None
    test_set: str = ""
    """Digest of the test images."""
    look: str = ""
    """Id of the evaluation in the test-set log."""
    n_looks: int = 0
    """Number of evaluations of these images, this one included."""

    @classmethod
    def read(cls, folder: FinalPaths) -> Self:
        """Return the result in a final's folder. Raises RecordError if it is damaged."""
        try:
            return from_json(cls, read_json(folder.result))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise RecordError(
                f"{folder.result} is damaged: put it back from a copy, or delete it to evaluate again"
            ) from error
