"""An MLflow run for a model that no training of ours made: a registered version needs one."""

import math
import time
from collections.abc import Mapping

from pipeline import storage
from pipeline.models.connection import Connection
from pipeline.models.names import RegistryError
from pipeline.training.delivery import Delivery, UnusableAnswerError
from pipeline.training.journal import Entry
from pipeline.training.run_description import RunDescription


def adopt(
    tracking_uri: str, description: RunDescription, metrics: Mapping[str, float], images_seen: int
) -> str:
    """The finished MLflow run of such a model; its id.

    Found by the description's key, or made, so that it may be called again. An SQLite database that is not
    there is made, too. Raises UnreachableError if MLflow cannot be reached, RegistryError if what answers is
    not MLflow, or the experiment was deleted.
    """
    connection = Connection(tracking_uri, create=True)
    delivery = Delivery(connection.client, description, storage.read_bytes)
    values = {key: value for key, value in metrics.items() if math.isfinite(value)}
    with connection.failures():
        try:
            delivery.connect()
            if values and not delivery.had_points:
                delivery.send(
                    [Entry("metrics", time.time_ns() // 10**6, {"at": images_seen, "values": values})]
                )
            delivery.set_status("FINISHED")
        except UnusableAnswerError as error:
            raise RegistryError(f"{connection.shown}: {error}") from error
    return delivery.run_id
