import pytest

from tests.faults import checkpoint_faults

pytestmark = pytest.mark.campaign


def test_damaged_checkpoints_and_killed_saves_are_survived() -> None:
    results = checkpoint_faults.run(seed=1, flips=1_000, kills=100)
    assert [what for counts in results for what in counts.broken] == []
    flips, mixed, kills = (counts.tried for counts in results)
    assert (flips, mixed) == (1_000, 9)
    # Those of the local disk: one launch makes so many operations on files.
    assert kills >= 30
