"""Describe a final result in sentences: prediction, choices, ensemble, evaluations of the test images, leaks."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hpsearch.choices import Chosen, Decision
from hpsearch.looks import Look, describe_looks
from hpsearch.stats.intervals import Interval, Paired

if TYPE_CHECKING:
    from hpsearch.final import FinalResult

N_NAMED = 5
"""Pairs or evaluations that are named; the rest is counted."""


def final_lines(result: FinalResult) -> list[str]:
    """One sentence a line, for a terminal."""
    metric = result.metric
    if result.predicted is not None:
        lines = [explain_test_mean(result.predicted, result.test[metric].mean)]
    else:
        lines = [
            f"trial {result.trial.number} is not the winner of the search (trial {result.winner} is), so there is no "
            "prediction to compare its test mean with"
        ]
    gain, of_winner = result.against_default, result.winner_against_default
    if result.is_default and result.trial.number == result.winner:
        lines.append("this is the default configuration: the search found nothing better")
    elif result.is_default and of_winner is not None:
        lines.append(
            f"this is the default configuration: trial {result.winner}, the best that the search found, gains "
            f"{_gain(of_winner)} over it, out of fold, corrected for selection"
        )
    elif gain is not None:
        lines.append(f"gain over trial 0 (the default), out of fold, corrected for selection: {_gain(gain)}")
    lines += describe_choices(result.chosen)
    if result.ensemble is not None:
        lines.append(
            f"the {result.ensemble.n_networks} networks of the folds together, over the network kept, on the same "
            f"test images: {_gain(result.ensemble.gain)}; that is for information: a choice by the test set would "
            "use it up"
        )
    lines += describe_account(result.look, result.looks, result.n_looks_before, result.n_trials_after)
    if result.leaks:
        pairs = [(pair.a, pair.b) for pair in result.leaks]
        lines.append(describe_leaks(pairs, result.test[metric].mean, result.without_leaks))
    return lines


def describe_choices(chosen: Chosen | None) -> list[str]:
    """What was decided out of fold, with the numbers."""
    if chosen is None:
        return [
            "threshold 0.5, no flips, no cleaning: no networks of this trial's folds were kept to choose otherwise by"
        ]
    listed = "; ".join(f"{_name(each)}: {_gain(each.gain)}, {_verdict(each)}" for each in chosen.decisions)
    return [f"choices by {chosen.n_images} out-of-fold predictions ({chosen.source}), gains: {listed}"]


def describe_account(look: Look, looks: Sequence[Look], n_before: int, n_after: int) -> list[str]:
    """How often the test images were evaluated, and how that bears on the search."""
    text = describe_looks(look, looks)
    if earlier := looks[: looks.index(look)]:
        listed = [
            f"{_day(each.at)} {each.study} trial {each.trial} "
            + (f"({each.score:.4f})" if each.score is not None else "(did not end)")
            for each in earlier
        ]
        more = f" and {len(listed) - N_NAMED} more" if len(listed) > N_NAMED else ""
        text += f": {', '.join(listed[-N_NAMED:])}{more}"
    lines = [text]
    if n_before:
        lines.append(
            f"caution: {n_before} evaluation{'s' if n_before > 1 else ''} came before this study began; the search "
            "may have been set up by what was learned from them"
        )
    if n_after:
        lines.append(
            f"caution: {n_after} trial{'s' if n_after > 1 else ''} of this study began after its first evaluation of "
            "these test images; the search may have used what it showed, so this is not a result on unseen images"
        )
    return lines


def describe_leaks(pairs: Sequence[tuple[str, str]], mean: float, without: float | None) -> str:
    """Name the images that pool and test share, and say what they do to the test mean."""
    named = ", ".join(f"{a} and {b}" for a, b in pairs[:N_NAMED])
    more = f" and {len(pairs) - N_NAMED} more" if len(pairs) > N_NAMED else ""
    n_pairs = f"{len(pairs)} pair{'s' if len(pairs) > 1 else ''} of duplicates or near-duplicates"
    text = f"caution: {n_pairs} across pool and test: {named}{more}"
    if without is not None:
        text += f"; without those test images the mean is {without:.4f} instead of {mean:.4f}"
    return text


def explain_test_mean(predicted: Interval, result: float) -> str:
    """Compare a test result with its prediction, in one sentence."""
    predicted_range = f"the 95 % prediction interval [{predicted.low:.4f}, {predicted.high:.4f}]"
    if predicted.low <= result <= predicted.high:
        return f"the test mean {result:.4f} lies within {predicted_range}, as the search predicted"
    side, causes = (
        (
            "above",
            "the test images are easier than the pool's, near-copies of pool images are among them, or training on "
            "the whole pool helped more than expected",
        )
        if result > predicted.high
        else (
            "below",
            "the test images are harder than the pool's or of another origin, the pool's folds share near-copies or "
            "patients, or the retraining went wrong",
        )
    )
    return (
        f"the test mean {result:.4f} lies {side} {predicted_range}, which is expected by chance in 2.5 % of studies; "
        f"possible reasons: {causes}"
    )


def _name(decision: Decision) -> str:
    return {
        "flips": "flips at test time",
        "threshold": f"threshold {decision.value:g}",
        "clean": "largest component, holes filled",
        "ensemble": "two networks together",
    }[decision.name]


def _verdict(decision: Decision) -> str:
    if decision.taken:
        return "taken"
    return "not taken: a loss" if decision.gain.high < 0 else "not taken: no more than noise"


def _gain(gain: Paired) -> str:
    return f"{gain.difference:+.4f} [{gain.low:+.4f}, {gain.high:+.4f}]"


def _day(at: float) -> str:
    return dt.datetime.fromtimestamp(at, dt.UTC).strftime("%Y-%m-%d %H:%M UTC")
