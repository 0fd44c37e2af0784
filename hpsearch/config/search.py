"""Settings of the search: the space, the protocol, the budget. Imports neither Optuna nor torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from hpsearch.errors import ConfigError

Scalar = bool | int | float | str
"""What a setting can be; pairs (height, width) are tuples."""


@dataclass(frozen=True, kw_only=True)
class StudySettings:
    """The protocol and the budget."""

    trials: int = 50
    """Trials to have evaluated, over all starts of the study."""
    folds: int | Literal["fixed"] = 5
    """k of the cross-validation; `fixed`: train on the training split, score the validation split."""
    metric: Literal["dice", "jaccard"] = "dice"
    """Per-image score whose mean is a trial's value."""
    seed: int = 0
    """Seed of folds, suggestions and fits."""
    sampler: Literal["tpe", "random", "cmaes", "gp"] = "tpe"
    """How configurations are suggested: by what trials have shown so far, or at random."""
    startup_trials: int = 10
    """Random trials before TPE models the space."""
    pruner: Literal["race", "median", "hyperband", "wilcoxon", "none"] = "race"
    """Rule that ends a trial early."""
    lookahead: int = 0
    """L: trial n is suggested and judged by what became of the trials up to n - L, so that the number of workers does
    not matter; 0: by all that is known."""
    eval_size: int | tuple[int, int] = 0
    """Size at which scores are computed; 0: `data.size`. Needed where `data.size` is searched."""
    allow_microbatch: bool = False
    """Whether a network with batch normalisation that does not fit the memory may be trained by parts of its batches:
    another network, which can never be the best."""
    confirm: int = 5
    """Configurations that are fitted once more after the search, to rank and to correct; 0: none."""

    def __post_init__(self) -> None:
        if self.trials < 1:
            raise ConfigError(f"study.trials must be at least 1, got {self.trials}")
        if self.folds != "fixed" and self.folds < 2:
            raise ConfigError(f"study.folds must be at least 2, or 'fixed', got {self.folds}")
        for name in ("seed", "confirm", "startup_trials"):
            if getattr(self, name) < 0:
                raise ConfigError(f"study.{name} must be at least 0, got {getattr(self, name)}")
        if self.lookahead < 0:
            raise ConfigError(f"study.lookahead must be at least 0, got {self.lookahead}")
        if self.lookahead and self.pruner not in ("race", "none"):
            raise ConfigError(
                f"study.lookahead (--deterministic) needs the pruner race or none: {self.pruner} goes by the order "
                "in which trials report"
            )
        sides = self.eval_size if isinstance(self.eval_size, tuple) else (self.eval_size,)
        if len(sides) > 2 or (self.eval_size != 0 and min(sides) < 8):
            raise ConfigError(
                f"study.eval_size must be one number or [height, width], each at least 8, got {self.eval_size}"
            )


@dataclass(frozen=True)
class Choice:
    """One of a few values."""

    values: tuple[Any, ...]

    @property
    def n_values(self) -> int | None:
        """Number of values."""
        return len(self.values)

    def key(self, value: Any) -> Any:
        """Return what two equal values share; JSON turns pairs into lists."""
        return tuple(value) if isinstance(value, list) else value

    def contains(self, value: Any) -> bool:
        return value in self.values

    def nearest(self, value: Any) -> Any:
        """Return the value that is closest to a number, the smaller of two; the first one for anything else."""
        if not all(_is_number(each) for each in (value, *self.values)):
            return self.values[0]
        return min(self.values, key=lambda each: (abs(each - value), each))

    def to_toml(self) -> Any:
        return [list(value) if isinstance(value, tuple) else value for value in self.values]


@dataclass(frozen=True, kw_only=True)
class Range:
    """Every value from `low` to `high`, both included; whole numbers if both are."""

    low: int | float
    high: int | float
    step: int | float | None = None
    log: bool = False

    @property
    def is_int(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)

    @property
    def n_values(self) -> int | None:
        """Number of values; None if there is one between any two of them."""
        if self.low == self.high:
            return 1
        if self.step is None:
            return int(self.high - self.low) + 1 if self.is_int else None
        # As Optuna has it: the range ends at the last step inside it.
        return math.floor((self.high - self.low) / self.step + 1e-9) + 1

    def key(self, value: Any) -> Any:
        """Return what two equal values share: with a step their place, since `low + 2 * step` may round."""
        return value if self.step is None or value is None else round((value - self.low) / self.step)

    def contains(self, value: Any) -> bool:
        if isinstance(value, str | bool | tuple) or not self.low <= value <= self.high:
            return False
        if self.is_int and value != int(value):
            return False
        if self.step is None:
            return True
        return math.isclose(round((value - self.low) / self.step) * self.step, value - self.low, abs_tol=1e-12)

    def nearest(self, value: Any) -> int | float:
        """Return the value of the range that is closest to a number; `low` for anything else."""
        if not _is_number(value):
            return self.low
        inside = min(max(value, self.low), self.high)
        if self.step is not None:
            n_steps = min(round((inside - self.low) / self.step), int((self.high - self.low) / self.step + 1e-9))
            inside = self.low + n_steps * self.step
        return round(inside) if self.is_int else float(inside)

    def to_toml(self) -> Any:
        table: dict[str, Any] = {"low": self.low, "high": self.high}
        if self.step is not None:
            table["step"] = self.step
        if self.log:
            table["log"] = True
        return table


@dataclass(frozen=True)
class SearchSpace:
    """What is searched: setting (`unet.depth`) to its values, in a fixed order."""

    dimensions: Mapping[str, Choice | Range] = field(default_factory=dict)

    def __iter__(self) -> Any:
        return iter(self.dimensions.items())

    def __len__(self) -> int:
        return len(self.dimensions)

    def __contains__(self, name: str) -> bool:
        return name in self.dimensions

    @property
    def n_configurations(self) -> int | None:
        """Number of different configurations; None if they are without end."""
        counts = [dimension.n_values for dimension in self.dimensions.values()]
        return None if None in counts else math.prod(count for count in counts if count is not None)

    def key(self, params: Mapping[str, Any]) -> tuple[Any, ...]:
        """Return a key that two sets of params share if they are the same configuration."""
        return tuple(dimension.key(params.get(name)) for name, dimension in self.dimensions.items())

    def without(self, name: str) -> SearchSpace:
        """The space with `name` pinned."""
        return SearchSpace({key: value for key, value in self.dimensions.items() if key != name})

    def to_toml(self) -> dict[str, Any]:
        return {name: dimension.to_toml() for name, dimension in self.dimensions.items()}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def parse_dimension(name: str, value: Any) -> Choice | Range:
    """A list is a Choice, a table with low and high a Range; ConfigError, naming the key, for anything else."""
    where = f"search.{name}"
    if isinstance(value, list | tuple):
        values = tuple(tuple(item) if isinstance(item, list) else item for item in value)
        if not values:
            raise ConfigError(f"{where} is empty: list at least one value")
        if len(set(values)) < len(values):
            raise ConfigError(f"{where} lists a value twice: {list(values)}")
        return Choice(values)
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where} must be a list of values or {{low = ..., high = ...}}, got {value!r}")
    known = ("low", "high", "step", "log")
    if unknown := sorted(set(value) - set(known)):
        raise ConfigError(f"{where} has an unknown key {unknown[0]!r}; known: {', '.join(known)}")
    if "low" not in value or "high" not in value:
        raise ConfigError(f"{where} needs both low and high")
    low, high, step, log = value["low"], value["high"], value.get("step"), value.get("log", False)
    for key, number in (("low", low), ("high", high), ("step", step)):
        if number is not None and (
            isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number)
        ):
            raise ConfigError(f"{where}.{key} must be a number, got {number!r}")
    if not isinstance(log, bool):
        raise ConfigError(f"{where}.log must be true or false, got {log!r}")
    if low > high:
        raise ConfigError(f"{where}: low {low} is above high {high}")
    if log and low <= 0:
        raise ConfigError(f"{where}: a logarithmic range must begin above 0, got low = {low}")
    if log and step is not None:
        raise ConfigError(f"{where}: log and step exclude each other")
    if step is not None and step <= 0:
        raise ConfigError(f"{where}.step must be above 0, got {step}")
    if isinstance(low, float) != isinstance(high, float):
        low, high = float(low), float(high)
    if isinstance(low, int) and isinstance(step, float):
        low, high = float(low), float(high)
    return Range(low=low, high=high, step=step, log=log)
