"""Find networks that predict the same class in every pixel of their held-out images, and name the likely causes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hpsearch.store.fits import FitRecord
from hpsearch.store.record import StudyRecord

logger = logging.getLogger(__name__)

Kind = Literal["no lesion", "nothing but lesion"]


@dataclass(frozen=True)
class ConstantFit:
    """A finished fit whose network predicts one class only."""

    trial: int
    fold: int
    is_second: bool
    kind: Kind


class ConstantWarnings:
    """Warns of such fits while a study runs, once per trial."""

    def __init__(self, record: StudyRecord, say: Callable[[str], None]) -> None:
        self._record = record
        self._say = say
        self._told: set[int] = set()

    def check(self, number: int) -> None:
        """Look at a trial of which a fit has just finished."""
        found = find_constant_fits(self._record, [number]) if number not in self._told else ()
        for line in describe(self._record, found):
            self._told.add(number)
            logger.warning("%s", line)
            self._say(f"warning: {line}")


def constant_prediction(fit: FitRecord) -> Kind | None:
    """Return the class that a finished fit's network predicts in every pixel, None if it does not or is right."""
    if not (fit.is_finished and fit.paths.counts.is_file()):
        return None
    tp, fp, fn, tn = fit.counts().sum(axis=0).tolist()
    if tp + fp == 0 and fn > 0:
        return "no lesion"
    return "nothing but lesion" if fn + tn == 0 and fp > 0 else None


def find_constant_fits(record: StudyRecord, trials: Iterable[int]) -> tuple[ConstantFit, ...]:
    """Return such fits of these trials, first fits and replicates, by trial and fold."""
    return tuple(
        ConstantFit(number, fold, is_second, kind)
        for number in trials
        for is_second, fit_of in ((False, record.fit), (True, record.replicate_fit))
        for fold in range(record.n_folds)
        if (kind := constant_prediction(fit_of(number, fold)))
    )


def describe(record: StudyRecord, fits: Sequence[ConstantFit]) -> list[str]:
    """Say in two sentences for each kind of constant prediction which trials have it, and what may be the cause."""
    lines = []
    for kind in ("no lesion", "nothing but lesion"):
        numbers = sorted({fit.trial for fit in fits if fit.kind == kind})
        places = []
        for number in numbers:
            folds = {fit.fold for fit in fits if fit.kind == kind and fit.trial == number}
            places.append(f"trial {number} ({len(folds)} of {record.n_folds} folds)")
        if numbers:
            configs = [record.trial(number).config for number in numbers]
            lines.append(
                f"{', '.join(places)}: the network predicts {kind} on all held-out images. {likely_causes(configs)}"
            )
    return lines


def likely_causes(configs: Sequence[dict[str, Any]]) -> str:
    """Return the sentence that names the settings which make a network predict one class only."""

    def shown(section: str, key: str) -> str:
        values = list(dict.fromkeys(str(config[section][key]) for config in configs))
        return f"{section}.{key} = {', '.join(values[:3])}{', ...' if len(values) > 3 else ''}"

    return (
        f"Likely causes: the learning rate ({shown('train', 'lr')}), the loss ({shown('train', 'loss')}), the "
        f"normalisation ({shown('unet', 'norm')}; {shown('unet', 'input_norm')}), or masks that are empty or wrong "
        "(see `hpsearch data check`)"
    )
