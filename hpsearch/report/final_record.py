"""Content of final.json, the result of `hpsearch final`."""

from dataclasses import dataclass, field
from typing import Any, Self

from hpsearch.data.duplicates import DuplicatePair
from hpsearch.errors import RecordError
from hpsearch.inference.postprocessing import SelectedPostprocessing
from hpsearch.paths import FinalPaths, read_json
from hpsearch.stats.intervals import Interval, Paired
from hpsearch.stats.selection import Corrected
from hpsearch.store import test_set_log
from hpsearch.store.record import StudyRecord
from hpsearch.store.test_set_log import LoggedEvaluation
from hpsearch.store.trials import FORMAT
from hpsearch.typed_json import from_json


@dataclass(frozen=True, kw_only=True)
class EnsembleResult:
    """Result of the ensemble of the fold networks, compared with the network trained on the whole pool."""

    n_networks: int
    test: dict[str, Interval]
    """Test scores by name at the size of the search, with the selected post-processing (the defaults if none was)."""
    official: dict[str, Interval]
    """Official scores by name at the original resolution of each image."""
    gain: Paired
    """Gain in the study's metric over the retrained network, on the same test images at the size of the search."""


@dataclass(frozen=True, kw_only=True, eq=False)
class FinalScores:
    """Scores of a retrained configuration, together with the estimates of the search.

    Fields with defaults may be missing in files of version 0.1.
    """

    study: str
    """Name of the study."""
    metric: str
    """The study's metric, `dice` or `jaccard`."""
    n_pool: int
    """Number of pool images that the networks were trained on."""
    n_test: int
    """Number of test images."""
    cv: Interval
    """Mean out-of-fold score of the trial with its 95 % interval; the mean over both fits if it was replicated."""
    cv_fold_std: float
    """Standard deviation of the fold means."""
    is_confirmed: bool = False
    """Whether the trial was replicated, so that `cv` is the mean over both fits."""
    corrected: Corrected | None = None
    """Mean of the trial, corrected for selection; None if the trial is not the winner."""
    predicted: Interval | None = None
    """Predicted mean on `n_test` images with its 95 % prediction interval; None if the trial is not the winner."""
    against_default: Paired | None
    """Gain of the trial over trial 0, corrected for selection; None for trial 0, or if trial 0 is not complete."""
    winner: int | None = None
    """Number of the study's best trial."""
    eval_size: tuple[int, int] | None = None
    """Height and width at which `test` and all trials are scored (`study.eval_size`, else `data.size`)."""
    test: dict[str, Interval]
    """Test scores by name: means over images and seeds, with 95 % intervals over images. They are computed like the
    scores of trials: at `eval_size`, with threshold 0.5, no test-time augmentation and no cleaning."""
    per_seed: dict[str, tuple[float, ...]]
    """Test scores by name: the mean over the images for each seed."""
    official: dict[str, Interval] = field(default_factory=dict)
    """Official test scores by name: means over images with 95 % intervals. They are computed at the original
    resolution of each image, for the kept network (the first seed) with its post-processing. Empty if unknown."""
    chosen: SelectedPostprocessing | None = None
    """Post-processing selected on out-of-fold predictions; None if no fold networks were kept."""
    chosen_test: dict[str, Interval] = field(default_factory=dict)
    """Test scores by name of the kept network (the first seed) with the selected post-processing, at `eval_size`.
    Empty if the defaults were selected."""
    ensemble: EnsembleResult | None = None
    """Result of the ensemble of the fold networks; None unless it was requested."""
    leaks: tuple[DuplicatePair, ...] = ()
    """Duplicates and near-duplicates with one image in the pool and one in the test split."""
    without_leaks: float | None = None
    """Mean of the study's metric over the test images that are not in `leaks`; None if none or all of them are."""


@dataclass(frozen=True, kw_only=True, eq=False)
class FinalRecord(FinalScores):
    """Content of final.json."""

    trial: int
    params: dict[str, Any]
    n_seeds: int
    began_at: float
    ended_at: float
    test_key: str
    """Key of the cache of the test images."""
    runtime: dict[str, Any]
    """Description of the machine."""
    format: int = FORMAT
    pool_key: str = ""
    test_set: str = ""
    """Digest of the test images."""
    look: str = ""
    """Id of the evaluation in the test-set log."""
    n_looks: int = 0
    """Number of evaluations of these images so far, including this one."""

    @classmethod
    def read(cls, folder: FinalPaths) -> Self:
        """Return the result in a final's folder. Raises RecordError if it is damaged."""
        try:
            return from_json(cls, read_json(folder.result))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise RecordError(
                f"{folder.result} is damaged: put it back from a copy, or delete it to evaluate again"
            ) from error


@dataclass(frozen=True, kw_only=True, eq=False)
class EvaluationHistory:
    """The evaluation of the test images by a final, and all other evaluations of these images."""

    evaluation: LoggedEvaluation
    """Entry of the final's evaluation in the test-set log."""
    evaluations: tuple[LoggedEvaluation, ...]
    """All known evaluations of any of these test images, including this one, in chronological order."""
    n_evaluations_before: int
    """Number of evaluations before the study began."""
    n_trials_after: int
    """Number of trials that began after the study's first evaluation of these images."""


def history_of(record: StudyRecord, evaluation: LoggedEvaluation) -> dict[str, Any]:
    """Return the fields of `EvaluationHistory` for an evaluation by a study."""
    began = [trial.began_at for trial in record.trials()]
    evaluations = test_set_log.evaluations_of(record.paths.project, evaluation)
    first = next(each for each in evaluations if each.is_of_same_study(evaluation))
    return {
        "evaluation": evaluation,
        "evaluations": evaluations,
        "n_evaluations_before": sum(each.at < began[0] for each in evaluations),
        "n_trials_after": sum(each > first.at for each in began),
    }
