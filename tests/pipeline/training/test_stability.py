"""The verdict on an update: what counts as a spike, and which rung of the ladder follows."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvae.health import Reading, Trouble
from pipeline.config import StabilityConfig
from pipeline.training.interventions import Intervention, Kind, from_record, to_record
from pipeline.training.stability import CALM, ENOUGH, WINDOW, Condition, Verdict, judge, limits

CONFIG = StabilityConfig(skips_in_a_row=3, max_rollbacks=2)
SPAN = 1000
NOT_FINITE = Reading(math.nan, math.nan, Trouble.LOSS | Trouble.GRADIENT, made=False)


def usual(number: int) -> Reading:
    """Losses and norms that scatter a little."""
    return Reading(loss=100 + number % 7 - 3, gradient_norm=math.exp(0.3 * (number % 5 - 2)))


def known(count: int = WINDOW) -> Condition:
    """After so many usual updates."""
    return Condition(
        losses=tuple(usual(n).loss for n in range(count)),
        log_norms=tuple(math.log(usual(n).gradient_norm) for n in range(count)),
        troubles=(0,) * count,
    )


class Run:
    """A training that is nothing but its readings: an image per update, judged as by all ranks."""

    def __init__(self, condition: Condition | None = None, config: StabilityConfig = CONFIG) -> None:
        self.condition, self.config = condition or known(), config
        self.images_seen = 500
        self.interventions: list[Intervention] = []

    def update(self, loss: float = 100.0, norm: float = 1.0) -> Verdict:
        """As `nvae.health.agree` would read it."""
        bounds = limits(self.config, self.condition)
        trouble = Trouble.NONE
        if not (math.isfinite(loss) and math.isfinite(norm)):
            trouble |= Trouble.LOSS
        if loss > bounds.loss:
            trouble |= Trouble.LOSS_SPIKE
        if norm > bounds.gradient_norm:
            trouble |= Trouble.GRADIENT_SPIKE
        made = trouble is Trouble.NONE or (bounds.clip and trouble is Trouble.GRADIENT_SPIKE)
        verdict = judge(
            self.config,
            self.condition,
            Reading(loss, norm, trouble, made),
            images_seen=self.images_seen,
            span_images=SPAN,
            interventions=self.interventions,
        )
        self.condition = verdict.condition
        self.images_seen += 1
        if verdict.kind is not None:
            self.interventions.append(Intervention(verdict.kind, self.images_seen, verdict.reason))
        if verdict.kind in (Kind.ROLL_BACK, Kind.SOFTEN):
            self.condition = known()
        return verdict

    def kinds(self, *updates: tuple[float, float]) -> list[str | None]:
        return [self.update(*each).kind for each in updates]


def test_a_usual_update_is_none_to_speak_of() -> None:
    run = Run()
    for number in range(1000):
        assert run.update(usual(number).loss, usual(number).gradient_norm).kind is None
    assert run.condition.onset is None
    assert len(run.condition.losses) == len(run.condition.log_norms) == len(run.condition.troubles) == WINDOW


@pytest.mark.parametrize("spike", [(200.0, 1.0), (100.0, 1e6)])
def test_a_spike_is_skipped_and_does_not_enter_the_window(spike: tuple[float, float]) -> None:
    run = Run()
    before = run.condition
    assert run.update(*spike).kind is Kind.SKIP
    assert (run.condition.losses, run.condition.log_norms) == (before.losses, before.log_norms)
    assert run.condition.onset == 500
    assert run.kinds(*[(100.0, 1.0)] * CALM) == [None] * CALM
    assert run.condition.onset is None


def test_nothing_is_a_spike_before_enough_is_known_but_nan_is_skipped_from_the_first_update_on() -> None:
    run = Run(Condition())
    assert run.update(math.nan, math.nan).kind is Kind.SKIP
    assert run.kinds(*[(10.0**n, 10.0**n) for n in range(ENOUGH)]) == [None] * ENOUGH
    assert run.update(1e200, 1.0).kind is Kind.SKIP


def test_a_fall_is_no_spike_however_steep() -> None:
    assert Run().kinds((1.0, 1e-9), (-1e6, 1e-30), (0.0, 0.0)) == [None] * 3


def test_too_many_skips_in_a_row_roll_back_then_soften_then_give_up() -> None:
    run = Run()
    rungs = [kind for kind in run.kinds(*[(math.nan, 1.0)] * 9) if kind != Kind.SKIP]
    assert rungs == [Kind.ROLL_BACK, Kind.SOFTEN, Kind.GIVE_UP]
    assert "3 updates in a row were skipped; the last one: not finite: loss" in run.interventions[-1].reason


def test_a_rollback_counts_for_one_span() -> None:
    run = Run()
    for _ in range(3):
        assert run.kinds(*[(math.nan, 1.0)] * 3)[-1] is Kind.ROLL_BACK
        run.images_seen += SPAN


def test_a_budget_of_none_gives_up_at_once() -> None:
    run = Run(config=replace_config(max_rollbacks=0))
    assert run.kinds(*[(math.nan, 1.0)] * 3) == [Kind.SKIP, Kind.SKIP, Kind.GIVE_UP]


def replace_config(**changes: Any) -> StabilityConfig:
    return CONFIG.model_copy(update=changes)


def test_too_large_a_share_of_skips_rolls_back_though_none_follows_another() -> None:
    run = Run(config=replace_config(skipped_fraction=0.1))
    kinds = run.kinds(*[(math.nan, 1.0), (100.0, 1.0)] * 20)
    assert kinds.index(Kind.ROLL_BACK) == 2 * 12  # the 13th of 128
    reasons = [each.reason for each in run.interventions if each.kind is Kind.ROLL_BACK]
    assert reasons == ["13 of the last 128 updates were skipped; the last one: not finite: loss"]


def test_the_onset_is_the_first_suspicious_update_not_the_first_skip() -> None:
    """The loss climbs in steps that are each accepted, until it is no number any more."""
    run = Run()
    climb = [(100.0 + 5.5 * step, 1.0) for step in range(1, 6)]
    assert run.kinds((100.0, 1.0), *climb) == [None] * 6
    suspicious = run.condition.onset
    assert suspicious is not None
    assert 501 < suspicious < 506
    run.kinds(*[(math.nan, 1.0)] * 2)
    assert run.update(math.nan, 1.0).condition.onset == suspicious


def test_a_gradient_norm_above_its_limit_for_ever_does_not_freeze_the_training() -> None:
    """The norm has found a level a thousand times higher; the loss falls as before."""
    run = Run()
    kinds = run.kinds(*[(100.0 - n / 100, 1000.0 + n) for n in range(300)])
    assert kinds[:3] == [Kind.SKIP, Kind.SKIP, Kind.CLIP]
    assert kinds[3:] == [None] * 297
    # The limit has followed, so that nothing is shortened any more.
    assert not run.condition.clipping
    assert 1000 < limits(CONFIG, run.condition).gradient_norm < math.inf
    assert run.condition.onset is None


def test_norms_that_grow_without_end_are_shortened_without_end() -> None:
    run = Run()
    kinds = run.kinds(*[(100.0, 1000.0 * 1.5**n) for n in range(400)])
    made = sum(kind is None for kind in kinds)
    assert made > 390
    assert {kind for kind in kinds if kind} == {Kind.SKIP, Kind.CLIP}


def test_a_loss_spike_that_comes_with_long_gradients_is_not_shortened_but_rolled_back() -> None:
    assert Run().kinds(*[(300.0, 1e9)] * 3)[-1] is Kind.ROLL_BACK


def test_an_episode_ends_when_the_window_knows_nothing_from_before_it() -> None:
    """Else a training whose loss scatters more than it did would never be saved again."""
    run, onsets = Run(), set()
    for number in range(10 * WINDOW):
        assert run.update(120.0 if number % 8 == 0 else usual(number).loss).kind is None
        onsets.add(run.condition.onset)
    assert len(onsets) == 11  # ten episodes, and none between them


def test_without_the_ladder_only_what_is_not_finite_is_skipped() -> None:
    run = Run(config=replace_config(enabled=False))
    assert run.kinds((1e9, 1e9), *[(math.nan, 1.0)] * 50) == [None] * 51
    assert len(run.condition.losses) == WINDOW
    assert not any(math.isnan(loss) for loss in run.condition.losses)
    # Nor does it keep checkpoints waiting.
    assert run.condition.onset is None


readings = st.tuples(
    st.floats(-1e3, 1e5) | st.just(math.nan), st.floats(0, 1e8) | st.just(math.inf) | st.just(1.0)
)


@given(st.lists(readings, max_size=60), st.integers(0, 60))
def test_a_run_that_is_resumed_takes_the_same_decisions(updates: list[tuple[float, float]], cut: int) -> None:
    """All that decides survives JSON bit for bit, wherever the cut lies."""
    whole, resumed = Run(known(ENOUGH)), Run(known(ENOUGH))
    verdicts = [whole.update(*each) for each in updates]
    found = [resumed.update(*each) for each in updates[:cut]]
    again = Run(Condition.from_record(json.loads(json.dumps(resumed.condition.to_record()))))
    again.images_seen = resumed.images_seen
    again.interventions = from_record(json.loads(json.dumps(to_record(resumed.interventions))))
    found += [again.update(*each) for each in updates[cut:]]
    assert found == verdicts
    assert again.interventions == whole.interventions


@given(st.lists(readings, max_size=40))
def test_whatever_comes_a_verdict_follows_and_skipped_values_never_enter_the_window(
    updates: list[tuple[float, float]],
) -> None:
    run = Run(known(ENOUGH))
    for each in updates:
        before = run.condition
        verdict = run.update(*each)
        if verdict.kind is not None:
            assert verdict.condition.losses == before.losses
            assert verdict.condition.onset is not None
        assert all(math.isfinite(value) for value in (*run.condition.losses, *run.condition.log_norms))


def test_the_condition_is_small() -> None:
    """It is in the manifest of every checkpoint."""
    assert len(json.dumps(replace(known(), clipping=True).to_record())) < 10_000
