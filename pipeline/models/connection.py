"""MLflow as those ask it who look models up or register them: its failures as one message each.

Requests go through training/mlflow_client.py, whose time limits follow the server's pace; here
is what a person waits for. Whatever goes wrong ends in an UnreachableError that names the
address, without the password in it, and the remedy.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from mlflow.exceptions import MlflowException

from pipeline import storage
from pipeline.errors import InputError
from pipeline.models.names import MissingDatabaseError, UnreachableError
from pipeline.training.mlflow_client import MISSING, Client
from pipeline.training.pace import PERSON_LIMIT_SECONDS, Pace

Answer = TypeVar("Answer")


class Connection:
    """One MLflow: a database (`sqlite:///...`) or a server.

    Every method raises UnreachableError if it cannot be reached or refuses.
    """

    def __init__(self, tracking_uri: str, *, create: bool = False) -> None:
        """With `create` an SQLite database that is not there is made, as the first training does."""
        if not create:
            _refuse_missing_database(tracking_uri)
        self.tracking_uri = tracking_uri
        self.client = Client(tracking_uri, Pace(PERSON_LIMIT_SECONDS))
        """For those who ask by themselves, within `failures`."""
        with self.failures():
            self.client.open()

    @property
    def shown(self) -> str:
        """The address, fit for messages."""
        return storage.shown(self.tracking_uri)

    def ask(self, request: Callable[[Any], Answer], *, but: str | None = None) -> Answer | None:
        """The answer to a request, which gets an MlflowClient.

        None if MLflow answers with the definite refusal `but`, one of those that mlflow_client names.
        """
        with self.failures():
            try:
                return self.client.ask(request)
            except MlflowException as error:
                if error.error_code == but:
                    return None
                raise

    def unless_missing(self, request: Callable[[Any], Answer]) -> Answer | None:
        """The answer, or None if MLflow answers that there is no such thing."""
        return self.ask(request, but=MISSING)

    def pages(self, search: Callable[..., Any]) -> Iterator[Any]:
        """Everything that a paged search finds; it gets an MlflowClient and the token of a page."""
        token = None
        while True:
            page: Any = self.ask(lambda mlflow, token=token: search(mlflow, token))  # type: ignore[misc]
            yield from page
            token = page.token
            if not token:
                return

    @contextmanager
    def failures(self) -> Iterator[None]:
        """Turns MLflow's failures into one message that names the address and the remedy."""
        try:
            yield
        except InputError:
            raise
        except Exception as error:
            # MLflow lets the exceptions of its database library through; that library is no
            # dependency of ours, so its types cannot be named here.
            foreign = type(error).__module__.startswith("sqlalchemy.")
            if not foreign and not isinstance(error, MlflowException | OSError | ImportError):
                raise
            # MLflow quotes the address, and a password in it would be in the traceback.
            raise self._failure(error) from (None if "@" in self.tracking_uri else error)

    def _failure(self, error: Exception) -> UnreachableError:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        reason = reason.replace(self.tracking_uri, self.shown)[:300]
        return UnreachableError(
            f"MLflow at {self.shown} cannot be used: {reason}\nCheck the address "
            "(--tracking or MLFLOW_TRACKING_URI), that the server runs, and that you may write there."
        )


def _refuse_missing_database(tracking_uri: str) -> None:
    """MLflow would create an empty database where an address is misspelt."""
    scheme, _, path = tracking_uri.partition(":///")
    if scheme == "sqlite" and not Path(path.partition("?")[0]).is_file():
        raise MissingDatabaseError(
            f"There is no MLflow database at {path}. The first training creates it; check --tracking, "
            "--store or MLFLOW_TRACKING_URI."
        )
