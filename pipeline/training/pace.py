"""How long MLflow may take to answer, how much it is sent at once, how soon it is asked again.

A fixed time limit is wrong for somebody: a short one never delivers to a server that needs
half a minute, a long one sits out each lost packet. So the limit follows the server. It
doubles with each answer that does not come in time, while requests carry fewer points,
and returns when answers are quick again.
"""

FIRST_LIMIT_SECONDS, LONGEST_LIMIT_SECONDS = 5.0, 120.0
PERSON_LIMIT_SECONDS = 20.0
"""The first limit where nobody asks again by himself: a person waits for one answer."""
MOST_POINTS, FEWEST_POINTS = 1000, 50
"""Points per request; more than 1,000 MLflow does not take."""
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.5, 30.0


class Pace:
    """What the answers so far have taught. A pure state: it neither waits nor asks."""

    def __init__(self, limit_seconds: float = FIRST_LIMIT_SECONDS) -> None:
        self.limit_seconds = limit_seconds
        """How long the next answer may take."""
        self.points = MOST_POINTS
        """How many points the next request carries at most."""

    def answered(self, seconds: float) -> None:
        """A request was answered after so long."""
        self.limit_seconds = min(
            max(FIRST_LIMIT_SECONDS, self.limit_seconds / 2, 4 * seconds), LONGEST_LIMIT_SECONDS
        )
        self.points = min(2 * self.points, MOST_POINTS)

    def too_slow(self) -> None:
        """A request was not answered in time."""
        self.limit_seconds = min(2 * self.limit_seconds, LONGEST_LIMIT_SECONDS)
        self.points = max(self.points // 2, FEWEST_POINTS)


def pause_seconds(failures: int, overloaded: bool) -> float:
    """How long to leave a server alone after that many failures in a row, at least one.

    `overloaded`: it asked for that.
    """
    if overloaded:
        return LONGEST_PAUSE_SECONDS
    return min(FIRST_PAUSE_SECONDS * 2.0 ** min(failures - 1, 10), LONGEST_PAUSE_SECONDS)
