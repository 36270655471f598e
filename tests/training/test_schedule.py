from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.methods.grpo import GRPO
from align.spec.train import TrainSettings
from align.training.schedule import RolloutSchedule, Schedule, StepDataset


@pytest.mark.parametrize(("examples", "batch", "epochs"), [(10, 4, 1), (10, 4, 3), (7, 7, 2), (5, 8, 2), (64, 16, 1.5)])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_together_see_every_example_once_per_epoch(examples, batch, epochs, world):
    schedule = Schedule.of(TrainSettings(global_batch_size=batch, epochs=epochs, seed=3), examples)
    ranks = [StepDataset(schedule, r, world) for r in range(world)]
    per_epoch = schedule.steps_per_epoch
    for epoch in range(int(epochs)):
        steps = range(epoch * per_epoch, (epoch + 1) * per_epoch)
        seen = [i for s in steps for rank in ranks for i in rank[s]]
        assert sorted(seen) == list(range(examples))


def test_a_step_is_the_same_batch_on_any_number_of_ranks():
    schedule = Schedule.of(TrainSettings(global_batch_size=6, epochs=2), 20)
    for step in range(schedule.total_steps):
        alone = sorted(StepDataset(schedule, 0, 1)[step])
        spread = sorted(i for r in range(4) for i in StepDataset(schedule, r, 4)[step])
        assert alone == spread == sorted(schedule.indices(step))


def test_epochs_and_seeds_shuffle_differently():
    one = Schedule(50, 50, 2, seed=0)
    assert one.indices(0) != one.indices(1)
    assert one.indices(0) != Schedule(50, 50, 2, seed=1).indices(0)
    assert one.indices(1) == Schedule(50, 50, 9, seed=0).indices(1)


@pytest.mark.parametrize(
    ("settings", "steps"), [({"max_steps": 7}, 7), ({"epochs": 2}, 6), ({}, 3), ({"epochs": 0.5}, 2)]
)
def test_length_of_a_run(settings, steps):
    assert Schedule.of(TrainSettings(global_batch_size=4, **settings), 10).total_steps == steps


# --- rollouts ---------------------------------------------------------------------------------------------------------

schedules = st.builds(
    lambda prompts, batch, parts, epochs, seed: RolloutSchedule(prompts, batch * parts, batch, epochs, 1000, seed),
    st.integers(1, 40), st.integers(1, 6), st.integers(1, 5), st.integers(1, 3), st.integers(0, 5),
)  # fmt: skip


@given(schedules)
def test_every_prompt_is_asked_once_per_epoch(schedule):
    rollouts = -(-3 * schedule.prompts // schedule.size)
    asked = [prompt for rollout in range(rollouts) for prompt in schedule.asked(rollout)]
    assert all(len(schedule.asked(rollout)) == schedule.size for rollout in range(rollouts))
    for epoch in range(3):
        part = asked[epoch * schedule.prompts : (epoch + 1) * schedule.prompts]
        assert sorted(part) == list(range(schedule.prompts))


@given(schedules, st.integers(0, 5), st.integers(1, 5))
def test_every_pass_over_a_rollout_sees_each_of_its_prompts_once_on_any_number_of_ranks(schedule, rollout, world):
    first = rollout * schedule.updates
    steps = range(first, first + schedule.updates)
    assert {schedule.rollout(step) for step in steps} == {rollout}
    assert schedule.rollout(first + schedule.updates) == rollout + 1
    ranks = [StepDataset(schedule, r, world) for r in range(world)]
    per_pass = schedule.size // schedule.batch
    for epoch in range(schedule.epochs):
        part = steps[epoch * per_pass : (epoch + 1) * per_pass]
        seen = [sorted(place for rank in ranks for place in rank[step]) for step in part]
        assert seen == [sorted(schedule.indices(step)) for step in part]
        assert {len(each) for each in seen} == {schedule.batch}
        assert sorted(place for each in seen for place in each) == list(range(schedule.size))


def test_passes_over_a_rollout_and_rollouts_are_of_different_orders():
    schedule = RolloutSchedule(100, 32, 32, 2, 100, seed=0)
    assert len({tuple(schedule.indices(step)) for step in range(6)}) == 6
    assert len({tuple(schedule.asked(rollout)) for rollout in range(6)}) == 6
    other = RolloutSchedule(100, 32, 32, 2, 100, seed=1)
    assert schedule.indices(0) != other.indices(0)
    assert schedule.asked(0) != other.asked(0)


@pytest.mark.parametrize(
    ("train", "steps"), [({"max_steps": 7}, 7), ({}, 3 * 6), ({"epochs": 2}, 5 * 6), ({"epochs": 0.4}, 6)]
)
def test_length_of_a_run_on_rollouts(train, steps):
    """40 prompts, 16 per rollout and 8 per step, three passes: six steps per rollout."""
    train = {"global_batch_size": 8} | train
    stage = GRPO(
        prompts="p", scorers=["s"], reference=None, prompts_per_rollout=16, epochs_per_rollout=3, train=train
    )  # fmt: skip
    schedule = RolloutSchedule.of(stage, 40)
    assert (schedule.total_steps, schedule.updates) == (steps, 6)
    assert len(StepDataset(schedule, 0, 1)) == steps
