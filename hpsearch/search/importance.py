"""Compute the importance of each searched setting: the share of the variance between trials that it explains."""

import optuna
from optuna.trial import TrialState

from hpsearch.config import get_setting
from hpsearch.search.space import distributions, frozen_trial
from hpsearch.store.record import StudyRecord

MIN_TRIALS = 8
"""Minimum number of trials. With fewer, the random forest would only fit noise."""


def importances(record: StudyRecord) -> dict[str, float]:
    """Return the share of the variance that each setting explains, largest first; empty if there are too few trials.

    The shares are computed by fANOVA (Hutter, Hoos and Leyton-Brown, ICML 2014) as implemented in Optuna, from
    complete trials and the estimates of pruned trials. They describe the whole space: a setting with some very bad
    values is important, even if all its good values are equally good.
    """
    spaces = distributions(record.config.search)
    trials = [
        trial for trial in record.trials() if trial.outcome in ("complete", "pruned") and trial.value is not None
    ]
    if not spaces or len(trials) < MIN_TRIALS or len({trial.value for trial in trials}) < 2:
        return {}
    # Imported here, because Optuna's random forest is slow to load and a `final` run needs it only at its end.
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize")
    for trial in trials:
        params = {name: get_setting(trial.study_config, name) for name in spaces}
        study.add_trial(frozen_trial(params, spaces, TrialState.COMPLETE, value=trial.value))
    found = get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0))
    return {name: float(share) for name, share in found.items()}
