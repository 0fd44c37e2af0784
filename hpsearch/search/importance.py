"""How much of the variation between trials each searched setting explains."""

import optuna
from optuna.trial import TrialState

from hpsearch.config import get_setting
from hpsearch.search.space import distributions, frozen_trial
from hpsearch.store.record import StudyRecord

MIN_TRIALS = 8
"""With fewer a forest describes chance."""


def importances(record: StudyRecord) -> dict[str, float]:
    """Return the share of the variance that each setting explains, the largest first; empty for too few trials.

    fANOVA (Hutter, Hoos and Leyton-Brown, ICML 2014) as Optuna computes it, over full trials and the estimates of
    dropped ones. It speaks of the whole space: a setting whose bad values ruin everything counts for much, even if
    its good values are all alike.
    """
    spaces = distributions(record.config.search)
    trials = [
        trial for trial in record.trials() if trial.outcome in ("complete", "pruned") and trial.value is not None
    ]
    if not spaces or len(trials) < MIN_TRIALS or len({trial.value for trial in trials}) < 2:
        return {}
    # Optuna's random forest is slow to load, and a final needs it only at its end.
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize")
    for trial in trials:
        params = {name: get_setting(trial.study_config, name) for name in spaces}
        study.add_trial(frozen_trial(params, spaces, TrialState.COMPLETE, value=trial.value))
    found = get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0))
    return {name: float(share) for name, share in found.items()}
