"""Find networks that predict the same class in every pixel of all held-out images, and name the likely causes."""

from collections.abc import Iterable

from hpsearch.store.fits import FitRecord
from hpsearch.store.record import StudyRecord


def constant_warnings(record: StudyRecord, trials: Iterable[int]) -> list[str]:
    """Return one warning for each class that a network of these trials predicts in every pixel."""
    found: dict[str, dict[int, set[int]]] = {}
    for number in trials:
        for replicate in (0, 1):
            for fold, fit in enumerate(record.fits(number, replicate)):
                if kind := constant_prediction(fit):
                    found.setdefault(kind, {}).setdefault(number, set()).add(fold)
    lines = []
    for kind, folds in sorted(found.items()):
        places = [f"trial {number} ({len(each)} of {record.n_folds} folds)" for number, each in sorted(folds.items())]
        lines.append(
            f"{', '.join(places)}: the network predicts {kind} on all held-out images. Likely causes: the learning "
            "rate (train.lr), the loss (train.loss), the normalisation (unet.norm, unet.input_norm), or masks that "
            "are empty or wrong (see `hpsearch data check`)"
        )
    return lines


def constant_prediction(fit: FitRecord) -> str:
    """Return the class that a finished fit's network wrongly predicts in every pixel; "" if there is none."""
    if not (fit.is_finished and fit.paths.counts.is_file()):
        return ""
    tp, fp, fn, tn = fit.counts().sum(axis=0).tolist()
    if tp + fp == 0 and fn > 0:
        return "no lesion"
    return "nothing but lesion" if fn + tn == 0 and fp > 0 else ""
