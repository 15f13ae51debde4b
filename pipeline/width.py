"""How many workers a run is trained on: a range, since nodes may come and go.

The batch is the run's, whatever its width: every worker has an equal share of it, so that only
divisors of the batch size will do. A narrower run has larger shares, which pass through in
micro-batches (pipeline/preparation.py), so that no worker needs more memory than at the widest.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Workers:
    """At least `minimum` workers, at best `maximum`."""

    minimum: int
    maximum: int

    @classmethod
    def parse(cls, text: str) -> "Workers":
        """`4`, or `2:8`. Raises ValueError on anything else."""
        low, colon, high = text.partition(":")
        workers = cls(int(low), int(high) if colon else int(low))
        if not 1 <= workers.minimum <= workers.maximum:
            raise ValueError(text)
        return workers

    @property
    def is_range(self) -> bool:
        return self.minimum < self.maximum

    def widths(self, batch_size: int) -> tuple[int, ...]:
        """The numbers of workers within the range that share a batch equally, fewest first."""
        return tuple(width for width in range(self.minimum, self.maximum + 1) if batch_size % width == 0)

    def __str__(self) -> str:
        return f"{self.minimum} to {self.maximum}" if self.is_range else str(self.maximum)
