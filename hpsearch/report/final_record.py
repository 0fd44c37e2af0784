"""The content of final.json, the result of `hpsearch final`."""

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
    """The ensemble of the fold networks, compared with the network that was trained on the whole pool."""

    n_networks: int
    test: dict[str, Interval]
    """As in `FinalScores.chosen_test`: with the selected post-processing, if there is any."""
    official: dict[str, Interval]
    gain: Paired
    """Gain in the study's metric over the retrained network, on the same test images at the size of the search."""


@dataclass(frozen=True, kw_only=True, eq=False)
class FinalScores:
    """Scores of a retrained configuration, beside the estimates of the search.

    Files of version 0.1 may lack the fields with defaults.
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
    """Mean of the out-of-fold scores, over both fits if it was replicated, with its 95 % interval."""
    cv_fold_std: float
    """Standard deviation of the fold means."""
    is_confirmed: bool = False
    """Whether the trial was fitted twice, so that `cv` is the mean over both fits."""
    corrected: Corrected | None = None
    """The winner's mean, corrected for selection; None if this is another trial."""
    predicted: Interval | None = None
    """Prediction of the search for this many test images, with its 95 % interval; None if it is not the winner."""
    against_default: Paired | None
    """Its gain over trial 0, corrected for selection; None for trial 0, or if trial 0 is not complete."""
    winner: int | None = None
    """Number of the study's best trial."""
    eval_size: tuple[int, int] | None = None
    """Height and width at which `test` is scored, as all trials were (`study.eval_size`, else `data.size`)."""
    test: dict[str, Interval]
    """Score by name at the size of the search: mean over images, and over seeds, with its 95 % interval over images.
    Scored as all trials are: threshold 0.5, no test-time augmentation, no cleaning."""
    per_seed: dict[str, tuple[float, ...]]
    """Score by name: for each seed, the mean over the test images."""
    official: dict[str, Interval] = field(default_factory=dict)
    """Official score by name, at each image's own resolution, of the network that is kept (the first seed's) with its
    post-processing. Mean over images with its 95 % interval; empty if they were not computed."""
    chosen: SelectedPostprocessing | None = None
    """Post-processing selected on out-of-fold predictions; None if no fold networks were kept."""
    chosen_test: dict[str, Interval] = field(default_factory=dict)
    """Like `test`, of the network that is kept, with the selected post-processing; empty if there is none."""
    ensemble: EnsembleResult | None = None
    """Result of the ensemble of the fold networks; None unless it was requested."""
    leaks: tuple[DuplicatePair, ...] = ()
    """Duplicates and near-duplicates with one image in the pool and one in the test split."""
    without_leaks: float | None = None
    """Mean of the study's metric over the test images without duplicates; None without leaks, or if all have one."""


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


@dataclass(frozen=True, kw_only=True, eq=False)
class EvaluationHistory:
    """The evaluation of the test images by a final, among all others of these images."""

    evaluation: LoggedEvaluation
    """This evaluation of the test images, as recorded in the test-set log."""
    evaluations: tuple[LoggedEvaluation, ...]
    """All known evaluations of any of these test images, this one included, in the order of time."""
    n_evaluations_before: int
    """Number of evaluations before the study began."""
    n_trials_after: int
    """Number of trials of the study that began after its first evaluation of these images."""


def history_of(record: StudyRecord, evaluation: LoggedEvaluation) -> dict[str, Any]:
    """Return the fields of `EvaluationHistory` of an evaluation by a study."""
    began = [trial.began_at for trial in record.trials()]
    evaluations = test_set_log.evaluations_of(record.paths.project, evaluation)
    first = test_set_log.first_evaluation_of(evaluations, record.name, began[0]) or evaluation
    return {
        "evaluation": evaluation,
        "evaluations": evaluations,
        "n_evaluations_before": test_set_log.n_evaluations_before(evaluations, began[0]),
        "n_trials_after": sum(each > first.at for each in began),
    }
