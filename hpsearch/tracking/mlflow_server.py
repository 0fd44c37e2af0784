"""Find the MLflow database or server of a project and connect to it.

Importing this module does not import MLflow.
"""

import logging
import os
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import quote

from filelock import FileLock

from hpsearch.errors import TrackingError, redact
from hpsearch.paths import ProjectPaths, atomic_write

logger = logging.getLogger(__name__)

ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    # If a response is lost, MLflow would repeat the request and create a second run. hpsearch checks
    # for that run before it repeats the request.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
}
"""Environment variables to set for MLflow unless the user has set them."""
ADDRESSES = "runs artifact_uri", "logged_models artifact_location", "model_versions source"
"""Tables and columns of MLflow's database that contain file URIs."""
REFUSALS = ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS", "BAD_REQUEST")
"""MLflow error codes for a single rejected request, when the server itself works."""


class MlflowServer:
    """Tracking server or database to which the runs of a project are logged."""

    def __init__(self, project: ProjectPaths, uri: str | None = None) -> None:
        """Use `uri`, else MLFLOW_TRACKING_URI, else mlflow.db in the project folder, where `mlflow ui` looks for it.

        Does not connect yet. Raises TrackingError for a file store, which MLflow no longer supports.
        """
        self.project = ProjectPaths(project.root.absolute())
        self._uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or None
        mlruns = self.project.mlruns
        if self._uri is None and any(path.parent.name.isdigit() for path in mlruns.glob("*/meta.yaml")):
            fault = f"{mlruns} contains runs of an old version of MLflow, with which `mlflow ui` does not start"
            command = f"mlflow migrate-filestore --source {mlruns} --target sqlite:///{mlruns.parent}/mlflow.db"
            raise TrackingError(f"{fault}: choose another --out, or run `{command}` and move the folder away")
        other = self._uri or "sqlite://"
        if other.startswith("file:") or ("://" not in other and other not in ("databricks", "uc")):
            raise TrackingError(f"cannot track to {redact(other)}: give a database (sqlite:////path) or a server")

    @property
    def uri(self) -> str:
        """Tracking URI without credentials."""
        return redact(self._uri or f"sqlite:///{self.project.mlflow_db}")

    @property
    def has_data(self) -> bool:
        """Whether the server may contain runs. False only if the project's own database does not exist yet."""
        return self._uri is not None or self.project.mlflow_db.is_file()

    def connect(self, experiment: str) -> tuple[Any, str | None]:
        """Return an MlflowClient and the artifact URI of an experiment.

        Creates the project's database if it is missing. The artifact URI is None if the server chooses it.
        """
        mlflow, root = import_mlflow(), (self.project.mlruns / experiment).as_uri()
        if self._uri is not None:
            is_server = self._uri.partition(":")[0] in ("http", "https", "databricks", "uc")
            return mlflow.MlflowClient(tracking_uri=self._uri), None if is_server else root
        uri = create_database(self.project)
        _repair_moved(self.project.mlflow_db, experiment, root)
        return mlflow.MlflowClient(tracking_uri=uri), root


def import_mlflow() -> Any:
    """Import MLflow with the environment variables in `ENVIRONMENT`, and return the module."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import mlflow

    # This logger prints a traceback for every MLflow error, and a line for each step of creating a database.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    return mlflow


def create_database(project: ProjectPaths) -> str:
    """Create the project's MLflow database atomically unless it exists, and return its URI."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    path, root = project.mlflow_db, project.mlruns.as_uri()
    uri = _sqlite_uri(path)
    with FileLock(path.with_name(f".{path.name}.lock")):
        for stale in path.parent.glob(f".{path.name}.*.tmp*"):
            stale.unlink(missing_ok=True)
        if not path.is_file():
            with atomic_write(path) as temporary:
                SqlAlchemyStore(_sqlite_uri(temporary), root).engine.dispose()
            # MLflow reuses connections within a process. Close them, because a connection to a deleted database would
            # lose all writes.
            SqlAlchemyStore(uri, root).engine.dispose()
    return uri


def is_external(error: Exception) -> bool:
    """Return whether an error was caused by MLflow, its database, the network or the disk, not by hpsearch."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return isinstance(error, MlflowException | SQLAlchemyError | sqlite3.Error | OSError | ImportError)


def is_outage(error: Exception) -> bool:
    """Return whether an error means that MLflow cannot be used at all, so that other requests would fail too."""
    is_refusal = getattr(error, "error_code", "") in REFUSALS
    return is_external(error) and not is_refusal and not isinstance(error, OSError)


def _sqlite_uri(path: Path) -> str:
    """Return the SQLAlchemy URI of a file. Raises TrackingError if SQLAlchemy would parse the path incorrectly."""
    from sqlalchemy.engine import make_url

    uri = f"sqlite:///{path}"
    # Quoting the path does not help: MLflow creates a folder with the quoted name.
    if make_url(uri).database != str(path):
        raise TrackingError(f"MLflow's database cannot be in {path.parent}, because of the '?' or '%' in its name")
    return uri


def _repair_moved(database_file: Path, experiment: str, root: str) -> None:
    """Change the artifact URIs of an experiment to `root` after its project was moved or copied.

    MLflow stores absolute URIs and has no request to change them. Without this correction, a copied project would
    write into the original.
    """
    with closing(sqlite3.connect(database_file, timeout=20)) as database, database:
        query = "SELECT experiment_id, artifact_location FROM experiments WHERE name = ?"
        found = database.execute(query, (experiment,)).fetchone()
        if found is None or found[1] == root or not str(found[1]).endswith(f"/mlruns/{quote(experiment)}"):
            return
        number, old = found
        database.execute("UPDATE experiments SET artifact_location = ? WHERE experiment_id = ?", (root, number))
        for table, column in map(str.split, (*ADDRESSES, "model_versions storage_location")):
            change = f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column}, 1, ?) = ?"
            database.execute(change, (root, len(old) + 1, len(old) + 1, f"{old}/"))
    logger.info("the project was moved: the files of study %r are now expected in %s", experiment, root)
