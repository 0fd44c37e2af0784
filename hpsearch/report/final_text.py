"""Describe a final result in sentences: prediction, post-processing, ensemble, earlier evaluations, duplicates."""

from __future__ import annotations

from collections.abc import Sequence

from hpsearch.data.duplicates import DuplicatePair
from hpsearch.inference.postprocessing import Decision, SelectedPostprocessing
from hpsearch.report.final_record import EnsembleResult
from hpsearch.report.finals import FinalRow, FinalScores
from hpsearch.report.formats import SCORES, count, interval, timestamp
from hpsearch.stats.intervals import Interval
from hpsearch.store.test_set_log import LoggedEvaluation, describe_evaluation_count

N_NAMED = 5
"""Pairs or evaluations that are named; the rest is counted."""


def introduce(final: FinalRow, metric: str) -> str:
    """Return what was retrained and evaluated, and its test score."""
    return (
        f"Trial {final.trial} was retrained on {count(final.n_pool, 'pool image')} "
        f"({count(max(1, final.n_seeds), 'network')}) and evaluated on {count(final.n_test, 'test image')}: "
        f"{SCORES[metric]} {interval(final.test[metric])}."
    )


def describe_final(final: FinalRow, metric: str, winner: int | None) -> list[str]:
    """Return all sentences about a final; `winner` is the winner of the search."""
    comparison = compare(final.predicted, final.test[metric].mean, winner)
    return [introduce(final, metric), comparison, *describe(final, metric)]


def describe(final: FinalScores, metric: str) -> list[str]:
    """Return the sentences about a final that follow its prediction (`compare`)."""
    lines = [describe_postprocessing(final.chosen)]
    if final.ensemble is not None:
        lines.append(describe_ensemble(final.ensemble, metric))
    lines += describe_evaluations(
        final.evaluation, final.evaluations, final.n_evaluations_before, final.n_trials_after
    )
    if final.leaks:
        lines.append(describe_leaks(final.leaks, final.test[metric].mean, final.without_leaks))
    return lines


def compare(predicted: Interval | None, result: float, winner: int | None) -> str:
    """Compare a test mean with its prediction, or say why there is none; `winner` is the winner of the search."""
    if predicted is None:
        which = f" (trial {winner} is)" if winner is not None else ""
        return f"It is not the winner of the search{which}, so there is no prediction for its test mean."
    prediction = f"the 95 % prediction interval [{predicted.low:.4f}, {predicted.high:.4f}]"
    if predicted.low <= result <= predicted.high:
        return f"The test mean {result:.4f} lies within {prediction}, as the search predicted."
    side, causes = (
        (
            "above",
            "the test images are easier than the pool, near-duplicates of pool images are among them, or training on "
            "the whole pool helped more than expected",
        )
        if result > predicted.high
        else (
            "below",
            "the test images are harder than the pool or from another source, the folds share near-duplicates or "
            "patients, or the retraining failed",
        )
    )
    return (
        f"The test mean {result:.4f} lies {side} {prediction}, which is expected by chance in 2.5 % of studies. "
        f"Possible reasons: {causes}."
    )


def describe_postprocessing(chosen: SelectedPostprocessing | None) -> str:
    """Return what was decided on out-of-fold predictions, with the gains."""
    if chosen is None:
        return (
            "Post-processing: threshold 0.5, no test-time augmentation, no cleaning. No fold networks of this trial "
            "were kept to select anything else."
        )
    listed = "; ".join(
        f"{_name(each)}: {interval(each.gain, signed=True)}, {_use(each)}" for each in chosen.decisions
    )
    return f"Post-processing, gains on {chosen.n_images} out-of-fold predictions ({chosen.source}): {listed}."


def describe_ensemble(ensemble: EnsembleResult, metric: str) -> str:
    """Return the score of the fold networks' ensemble and its gain over the retrained network."""
    return (
        f"The ensemble of the {count(ensemble.n_networks, 'fold network')} scores {interval(ensemble.test[metric])} "
        f"on the same test images, {interval(ensemble.gain, signed=True)} compared with the retrained network. This "
        "is for information only: if the test set decided between them, it would no longer be a test set."
    )


def describe_evaluations(
    evaluation: LoggedEvaluation, evaluations: Sequence[LoggedEvaluation], n_before: int, n_after: int
) -> list[str]:
    """Return how often the test images were evaluated, and which evaluations may have affected the search."""
    text = describe_evaluation_count(evaluation, evaluations)
    if earlier := evaluations[: evaluations.index(evaluation)]:
        listed = [
            f"{timestamp(each.at)} {each.study} trial {each.trial} "
            + (f"({each.score:.4f})" if each.score is not None else "(not finished)")
            for each in earlier
        ]
        more = f" and {len(listed) - N_NAMED} more" if len(listed) > N_NAMED else ""
        text += f": {', '.join(listed[-N_NAMED:])}{more}"
    lines = [f"{text[0].upper()}{text[1:]}."]
    if n_before:
        lines.append(
            f"Caution: {count(n_before, 'evaluation')} took place before this study began. The results may have "
            "influenced how the search was set up."
        )
    if n_after:
        lines.append(
            f"Caution: {count(n_after, 'trial')} of this study began after its first evaluation of these test "
            "images. The search may have used that result, so this is not a result on unseen images."
        )
    return lines


def describe_leaks(pairs: Sequence[DuplicatePair], mean: float, without: float | None) -> str:
    """Return the images that pool and test share, and their effect on the test mean."""
    named = ", ".join(f"{pair.a} and {pair.b}" for pair in pairs[:N_NAMED])
    more = f" and {len(pairs) - N_NAMED} more" if len(pairs) > N_NAMED else ""
    n_pairs = f"{count(len(pairs), 'pair')} of duplicates or near-duplicates"
    text = f"Caution: pool and test share {n_pairs}: {named}{more}."
    return text if without is None else f"{text} Without those test images the mean is {without:.4f}, not {mean:.4f}."


def _name(decision: Decision) -> str:
    return {
        "flips": "test-time augmentation (flips)",
        "threshold": f"threshold {decision.value:g}",
        "clean": "largest component with holes filled",
        "ensemble": "ensemble of both fits",
    }[decision.name]


def _use(decision: Decision) -> str:
    if decision.taken:
        return "used"
    return "not used (worse)" if decision.gain.high < 0 else "not used (within noise)"
