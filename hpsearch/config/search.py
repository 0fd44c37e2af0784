"""Search settings: evaluation protocol, budget and search space. Imports neither Optuna nor torch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeGuard

from hpsearch.config.values import ModuleName, Size, check_at_least, check_size, convert, require
from hpsearch.errors import ConfigError

_SAMPLER, _PRUNER = ModuleName("search/samplers"), ModuleName("search/pruners")


@dataclass(frozen=True, kw_only=True)
class StudySettings:
    """Settings of the evaluation protocol and the search budget."""

    trials: int = 50
    """Total number of trials, including those of earlier runs of the study. Infeasible trials do not count."""
    until_gain: float = 0.0
    """End the search early if the remaining trials are unlikely to improve the score by this much; 0: never."""
    folds: int | Literal["fixed"] = 5
    """Number of cross-validation folds. `fixed`: train on the training split and score the validation split."""
    metric: Literal["dice", "jaccard"] = "dice"
    """Score whose mean over the held-out images ranks the trials. `iou` is an alias of `jaccard`."""
    seed: int = 0
    """Seed for the folds, the sampler and the fits, for random crops in a cache, and for `hpsearch data augment`."""
    sampler: Annotated[str, _SAMPLER] = "tpe"
    """Sampler that suggests configurations: the name of a module in `hpsearch/search/samplers/`."""
    startup_trials: int = 10
    """Number of random trials before the sampler starts to use the results of earlier trials."""
    pruner: Annotated[str, _PRUNER] = "race"
    """Pruner that stops trials early: the name of a module in `hpsearch/search/pruners/`."""
    lookahead: int = 0
    """If set to L > 0, trial n is suggested and pruned from the results of trials up to n - L only, so that the study
    does not depend on the number of workers. 0: all results so far are used."""
    eval_size: Size = 0
    """Height and width at which scores are computed; 0: `data.size`. Required if `data.size` is searched."""
    confirm: int = 5
    """Number of top trials to refit with new seeds after the search. They are ranked by the mean of both fits; 0:
    none."""

    def __post_init__(self) -> None:
        check_at_least("study", self, 1, "trials")
        check_at_least("study", self, 0, "seed", "confirm", "startup_trials", "lookahead", "until_gain")
        is_valid = self.folds == "fixed" or self.folds >= 2
        require(is_valid, f"study.folds must be at least 2, or 'fixed', got {self.folds}")
        _SAMPLER.check("study.sampler", self.sampler)
        _PRUNER.check("study.pruner", self.pruner)
        is_valid = not self.lookahead or self.pruner in ("race", "none")
        reason = f"{self.pruner} depends on the order in which trials report"
        require(is_valid, f"study.lookahead (--deterministic) needs the pruner race or none: {reason}")
        if self.eval_size != 0:
            check_size("study.eval_size", self.eval_size)


@dataclass(frozen=True)
class Choice:
    """Dimension of the search space with a list of values."""

    values: tuple[Any, ...]

    @property
    def n_values(self) -> int | None:
        """Number of values."""
        return len(self.values)

    @property
    def extremes(self) -> tuple[Any, ...]:
        """All values, because a list has no order. Each is validated, and `hpsearch plan` shows its cost."""
        return self.values

    def key(self, value: Any) -> Any:
        """Return a key that is the same for equal values. A pair may be a list, because JSON has no tuples."""
        return tuple(value) if isinstance(value, list) else value

    def contains(self, value: Any) -> bool:
        """Return whether `value` is one of the values."""
        return value in self.values

    def nearest(self, value: Any) -> Any:
        """Return the choice that is closest to `value`, or the smaller one if two are equally close.

        Returns the first choice if `value` or one of the choices is not a number.
        """
        if not all(_is_number(each) for each in (value, *self.values)):
            return self.values[0]
        return min(self.values, key=lambda each: (abs(each - value), each))

    def to_toml(self) -> Any:
        """Return the values as a list that can be written as TOML."""
        return [list(value) if isinstance(value, tuple) else value for value in self.values]


@dataclass(frozen=True, kw_only=True)
class Range:
    """Dimension of the search space from `low` to `high`, both included.

    Its values are integers if both bounds are. `step` is the distance between neighbouring values; None means 1 for
    integers, and otherwise any value in the range. `log` means that values are sampled on a logarithmic scale.
    """

    low: int | float
    high: int | float
    step: int | float | None = None
    log: bool = False

    @property
    def is_int(self) -> bool:
        """Whether the values are integers."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    @property
    def n_values(self) -> int | None:
        """Number of values; None for a continuous range."""
        if self.low == self.high:
            return 1
        # As in Optuna, the range ends at the last step inside it.
        return None if self._step is None else math.floor((self.high - self.low) / self._step + 1e-9) + 1

    @property
    def extremes(self) -> tuple[Any, ...]:
        """The two ends of the range. Each is validated, and `hpsearch plan` shows its cost."""
        return self.low, self.high

    @property
    def _step(self) -> int | float | None:
        return 1 if self.is_int and self.step is None else self.step

    def key(self, value: Any) -> Any:
        """Return a key that is the same for equal values.

        With a step it is the number of steps from `low`, because `low + 2 * step` may have a rounding error.
        """
        return value if self.step is None or value is None else round((value - self.low) / self.step)

    def contains(self, value: Any) -> bool:
        """Return whether `value` is in the range."""
        is_inside = _is_number(value) and self.low <= value <= self.high
        return is_inside and math.isclose(self.nearest(value), value, abs_tol=1e-12)

    def nearest(self, value: Any) -> int | float:
        """Return the value in the range that is closest to `value`, or `low` if `value` is not a number."""
        if not _is_number(value):
            return self.low
        inside = min(max(value, self.low), self.high)
        if self._step is not None:
            inside = self.low + min(round((inside - self.low) / self._step), (self.n_values or 1) - 1) * self._step
        return round(inside) if self.is_int else float(inside)

    def to_toml(self) -> Any:
        """Return the table that describes the range in TOML."""
        table = {"low": self.low, "high": self.high, "step": self.step, "log": self.log}
        return {key: value for key, value in table.items() if value is not None and value is not False}


class SearchSpace(dict[str, Choice | Range]):
    """Search space: the dimensions of the searched settings by name (`unet.depth`), in a fixed order."""

    @property
    def n_configurations(self) -> int | None:
        """Number of different configurations; None if it is infinite."""
        counts = [dimension.n_values or 0 for dimension in self.values()]
        return math.prod(counts) or None

    def key(self, params: Mapping[str, Any]) -> tuple[Any, ...]:
        """Return a key that is the same for params that describe the same configuration."""
        return tuple(dimension.key(params.get(name)) for name, dimension in self.items())

    def to_toml(self) -> dict[str, Any]:
        """Return the `[search]` table of the TOML file."""
        return {name: dimension.to_toml() for name, dimension in self.items()}


def parse_dimension(name: str, value: Any) -> Choice | Range:
    """Return a Choice for a list, or a Range for a table with low and high.

    Raises ConfigError with the name of the key for anything else.
    """
    where = f"search.{name}"
    if isinstance(value, list | tuple):
        values = tuple(tuple(item) if isinstance(item, list) else item for item in value)
        require(bool(values), f"{where} is empty: list at least one value")
        is_repeated = any(item in values[:place] for place, item in enumerate(values))
        require(not is_repeated, f"{where} lists a value twice: {list(values)}")
        return Choice(values)
    if isinstance(value, Mapping):
        return _parse_range(where, value)
    raise ConfigError(f"{where} must be a list of values or {{low = ..., high = ...}}, got {value!r}")


def _parse_range(where: str, table: Mapping[str, Any]) -> Range:
    known = {"low": float | int, "high": float | int, "step": float | int, "log": bool}
    require(set(table) <= set(known), f"{where} has an unknown key; known: {', '.join(known)}")
    require("low" in table and "high" in table, f"{where} needs both low and high")
    for key, value in table.items():
        convert(value, known[key], f"{where}.{key}")
    low, high, step, log = table["low"], table["high"], table.get("step"), table.get("log", False)
    require(low <= high, f"{where}: low {low} is above high {high}")
    require(not log or low > 0, f"{where}: a logarithmic range must start above 0, got low = {low}")
    require(not log or step is None, f"{where}: log and step cannot be combined")
    require(step is None or step > 0, f"{where}.step must be above 0, got {step}")
    if any(isinstance(number, float) for number in (low, high, step)):
        low, high = float(low), float(high)
    return Range(low=low, high=high, step=step, log=log)


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
