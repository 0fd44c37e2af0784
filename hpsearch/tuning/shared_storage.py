"""Optuna's storage on a server that several coordinators use: opened, quick to ask, and named where it is away."""

from __future__ import annotations

import logging
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import optuna
import sqlalchemy
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from sqlalchemy.exc import SQLAlchemyError

from hpsearch.errors import ConfigError, StudyError
from hpsearch.tuning.coordinators import Sharing

logger = logging.getLogger(__name__)

AWAY = (SQLAlchemyError, StorageInternalError)
"""What a database raises that is away, or too busy."""
RETRY_S = 2.0
"""Pause before a database that is away is tried again."""

T = TypeVar("T")


def open_storage(url: str, sharing: Sharing) -> RDBStorage:
    """Optuna's storage at the URL, its tables made if they are not there.

    Raises ConfigError if its driver is not installed, StudyError if the database cannot be used.
    """

    def make() -> RDBStorage:
        return RDBStorage(
            url,
            engine_kwargs=_engine_settings(url, max(5000, 250 * sharing.grace_s)),
            heartbeat_interval=sharing.heartbeat_s,
            grace_period=sharing.grace_s,
            heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(),
        )

    with refusals_named(url):
        return _again_if_refused(make)


@contextmanager
def refusals_named(url: str) -> Iterator[None]:
    """Turn what the database raises into a ConfigError or StudyError that names it, without its password."""
    try:
        with quiet():
            yield
    except (ImportError, sqlalchemy.exc.NoSuchModuleError) as error:
        shown = sqlalchemy.make_url(url).drivername
        raise ConfigError(
            f"--storage {shown}://...: its driver is not installed; `pip install hpsearch[distributed]` brings "
            "that of postgresql+psycopg://"
        ) from error
    except (SQLAlchemyError, RuntimeError, StorageInternalError) as error:
        shown = sqlalchemy.make_url(url).render_as_string(hide_password=True)
        raise StudyError(f"Optuna cannot use {shown}: {reason(error)}") from error


def patiently(make: Callable[[], T], seconds: float) -> T:
    """What `make` gives, tried again for so long while it raises a StudyError because the database is away."""
    give_up_at = time.monotonic() + seconds
    while True:
        try:
            return make()
        except StudyError as error:
            if not isinstance(error.__cause__, AWAY) or time.monotonic() >= give_up_at:
                raise
            logger.warning("tries again for %.0f s: %s", give_up_at - time.monotonic(), error)
            time.sleep(RETRY_S)


def uptime_s(storage: RDBStorage) -> float:
    """Seconds since the server started: before that, nobody could tell it anything. 0 where that cannot be known."""
    if storage.engine.name != "postgresql":
        return 0.0
    query = "SELECT EXTRACT(EPOCH FROM now() - pg_postmaster_start_time())"
    try:
        with storage.engine.connect() as connection:
            return float(connection.execute(sqlalchemy.text(query)).scalar_one())
    except SQLAlchemyError:
        return 0.0


def beaten(storage: RDBStorage, study_id: int) -> set[int]:
    """Ids of the running trials that ever had a heartbeat."""
    query = sqlalchemy.text(
        "SELECT trial_heartbeats.trial_id FROM trial_heartbeats JOIN trials USING (trial_id) "
        "WHERE trials.study_id = :study AND trials.state = 'RUNNING'"
    )
    with storage.engine.connect() as connection:
        return {row[0] for row in connection.execute(query, {"study": study_id})}


def n_by_state(storage: RDBStorage, study_id: int) -> Counter[str]:
    """How many trials the study has in each of Optuna's states, at a hundredth of the cost of reading them."""
    query = sqlalchemy.text("SELECT state, COUNT(*) FROM trials WHERE study_id = :study GROUP BY state")
    with storage.engine.connect() as connection:
        return Counter({row[0]: row[1] for row in connection.execute(query, {"study": study_id})})


def reason(error: Exception) -> str:
    """The first line of what a database says; it names no password."""
    return str(getattr(error, "orig", None) or error.__cause__ or error).strip().partition("\n")[0]


@contextmanager
def quiet() -> Iterator[None]:
    """Without Optuna's notes on heartbeats and on what is experimental: what is relied on is tested."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        warnings.filterwarnings("ignore", "Heartbeat of storage is supposed")
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        yield


def _again_if_refused(make: Callable[[], T]) -> T:
    """Two that make the same tables at the same instant get into each other's way: once more, and they are there."""
    for attempt in range(5):
        try:
            return make()
        except (sqlalchemy.exc.IntegrityError, sqlalchemy.exc.ProgrammingError):
            time.sleep(0.2 * (attempt + 1))
    return make()


def _engine_settings(url: str, patience_ms: int) -> dict[str, Any]:
    if not url.startswith("postgresql"):
        return {"pool_pre_ping": True}
    # A server that does not answer is noticed soon; and a coordinator that is suspended in the midst of a transaction
    # gives back what it has locked, for the others wait for it.
    options = f"-c idle_in_transaction_session_timeout={patience_ms} -c lock_timeout={patience_ms}"
    arguments = {
        "connect_timeout": 5,
        "keepalives_idle": 10,
        "keepalives_interval": 5,
        "keepalives_count": 3,
        "tcp_user_timeout": 20000,
        "options": options,
    }
    return {"pool_pre_ping": True, "connect_args": arguments}
