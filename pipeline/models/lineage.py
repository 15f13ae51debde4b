"""Where the weights of an exported model come from: plain values, kept in its manifest and its tags."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Lineage:
    """Where weights come from."""

    run_name: str
    run_id: str
    """MLflow run that trained them."""
    images_seen: int
    data_hash: str
    """Content hash of the data set."""
    code_version: str
    parent: str | None = None
    """Model whose weights the run began with."""
    diverged: bool = False
    """Whether the run ended as diverged; the weights are from before."""
    data_licence: str = ""
    """The note on the images' licence that is kept with the data set."""
    trial: str = ""
    """SEARCH/NUMBER, if the run is a trial."""
    world_size: int | None = None
    """Workers of the launch that ended the run."""
    ray_job: str = ""
    """Ray's job of that launch; `local` without Ray."""
    journal: str = ""
    """Folder of the points of the run's curves."""
