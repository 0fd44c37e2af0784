"""Log all evaluations of test images: when, by which study, and with which score.

A test set that is evaluated often becomes a second validation set. An evaluation is logged before it begins, so that
it counts even if it is killed. It is logged in the project folder and in the user's state folder, so that other
projects know of it. Images are identified individually by the content of their files, so that an evaluation of a few
images counts for these images only.
"""

import dataclasses
import json
import logging
import os
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from hpsearch.data.cache import Index
from hpsearch.errors import StorageError
from hpsearch.paths import ProjectPaths, append_line, sha256_text
from hpsearch.typed_json import from_json

logger = logging.getLogger(__name__)

Hashes = tuple[tuple[str, str], ...]
"""SHA-256 of the image and of its mask, for each image of a test set."""


@dataclass(frozen=True, kw_only=True)
class LoggedEvaluation:
    """One evaluation of test images."""

    test_set: str
    """Digest of all images and masks together, independent of their order, 16 hexadecimal digits. Version 0.1
    identified test sets by this digest only."""
    at: float
    """Start of the evaluation (Unix time in seconds)."""
    study: str
    study_began_at: float
    """Start of the study's first trial. Together with the name it identifies the study, even if its folder is
    moved."""
    trial: int
    folder: str
    """Absolute path of the project folder at the time of the evaluation."""
    n_images: int
    metric: str
    score: float | None = None
    """Mean score over the images; None if the evaluation did not finish."""
    images: tuple[str, ...] = ()
    """Digest of each image's file, 12 hexadecimal digits; empty in entries of version 0.1."""
    id: str = field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def configuration(self) -> tuple[str, float, int]:
        return self.study, self.study_began_at, self.trial

    def is_of_same_study(self, other: Self) -> bool:
        return self.configuration[:2] == other.configuration[:2]


def hashes_in_cache(folder: Path) -> Hashes:
    """Return, for each image in a cache, the SHA-256 of the image and of its mask."""
    return tuple((each.image_sha256, each.mask_sha256) for each in Index.read(folder).stats)


def begin_evaluation(project: ProjectPaths, hashes: Hashes, **facts: Any) -> LoggedEvaluation:
    """Log an evaluation that is about to begin.

    `hashes` contains the SHA-256 of each test image and of its mask. `facts` contains the fields of the entry that do
    not follow from `hashes`, such as `study` and `trial`.
    """
    images = tuple(image[:12] for image, _ in hashes)
    test_set = sha256_text("\n".join(sorted(f"{image} {mask}" for image, mask in hashes)))[:16]
    evaluation = LoggedEvaluation(test_set=test_set, images=images, n_images=len(images), **facts)
    enter_evaluation(project, evaluation)
    return evaluation


def end_evaluation(project: ProjectPaths, evaluation: LoggedEvaluation, score: float) -> None:
    """Log the mean score of a finished evaluation."""
    _append(project, {"id": evaluation.id, "score": score})


def enter_evaluation(project: ProjectPaths, evaluation: LoggedEvaluation) -> None:
    """Write an evaluation to the project's log and, if it is writable, to the user's log."""
    _append(project, dataclasses.asdict(evaluation))


def find_evaluation(project: ProjectPaths, id: str) -> LoggedEvaluation | None:
    """Return the evaluation with this id; None if there is none."""
    return next((evaluation for evaluation in _entries(project) if evaluation.id == id), None)


def evaluations_of(project: ProjectPaths, evaluation: LoggedEvaluation) -> tuple[LoggedEvaluation, ...]:
    """Return all known evaluations that share images with this one, including itself, by time."""
    others = [each for each in _entries(project) if each.id != evaluation.id and n_shared(each, evaluation)]
    return tuple(sorted((*others, evaluation), key=lambda each: (each.at, each.id)))


def n_shared(a: LoggedEvaluation, b: LoggedEvaluation) -> int:
    """Return the number of images that two evaluations share, as far as is known.

    Entries of version 0.1 do not identify their images. If one of the two evaluations is such an entry, they are
    assumed to share as many images as possible if they have the same test set or belong to the same study, because
    the test images of a study never change.
    """
    if a.images and b.images:
        return len(set(a.images) & set(b.images))
    is_known = bool(a.test_set and b.test_set)
    is_shared = is_known and (a.test_set == b.test_set or a.is_of_same_study(b))
    return min(a.n_images, b.n_images) if is_shared else 0


def n_seen(evaluation: LoggedEvaluation, others: Sequence[LoggedEvaluation]) -> int:
    """Return how many of an evaluation's images were also evaluated by any of the others, as far as is known."""
    named = {image for other in others for image in other.images} & set(evaluation.images)
    return max([len(named), *(n_shared(evaluation, other) for other in others)])


def describe_evaluation_count(evaluation: LoggedEvaluation, evaluations: Sequence[LoggedEvaluation]) -> str:
    """Describe in one sentence how often an evaluation's images had been evaluated before."""
    earlier = evaluations[: evaluations.index(evaluation)]
    n_later = len(evaluations) - len(earlier) - 1
    images = _count(evaluation.n_images, "test image")
    text = f"this is the first evaluation of these {images}"
    if earlier:
        n = n_seen(evaluation, earlier)
        which = "" if n == evaluation.n_images else f"{n} of "
        configurations = _count(len({each.configuration for each in earlier}), "configuration")
        before = f"{_count(len(earlier), 'evaluation')} of {configurations}"
        text = f"{which}these {images} had been evaluated before: {before}"
    return text + (f"; {_count(n_later, 'evaluation')} came later" if n_later else "")


def user_account() -> Path:
    """Return the path of the user's log, in $XDG_STATE_HOME or ~/.local/state."""
    return Path(os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state"), "hpsearch/test-looks.jsonl")


def _append(project: ProjectPaths, table: dict[str, Any]) -> None:
    line = json.dumps(table)
    append_line(project.looks, line)
    state = user_account()
    try:
        state.parent.mkdir(parents=True, exist_ok=True)
        append_line(state, line)
    except (OSError, StorageError) as error:
        logger.info("this evaluation of the test set is logged in the project folder only: %s", error)


def _entries(project: ProjectPaths) -> list[LoggedEvaluation]:
    """Return all evaluations in both logs, with their scores. Damaged lines are ignored."""
    found: dict[str, LoggedEvaluation] = {}
    for path in (project.looks, user_account()):
        lines = []
        with suppress(OSError):
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        for line in lines:
            # Ignore truncated lines, lines in another format, and scores of unknown evaluations.
            with suppress(ValueError, TypeError, KeyError, AttributeError):
                table = json.loads(line)
                if table.keys() == {"id", "score"}:
                    found[table["id"]] = dataclasses.replace(found[table["id"]], score=table["score"])
                else:
                    evaluation = from_json(LoggedEvaluation, table)
                    found.setdefault(evaluation.id, evaluation)
    return list(found.values())


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"
