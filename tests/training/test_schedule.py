from __future__ import annotations

import pytest

from align.spec.train import TrainSettings
from align.training.schedule import Schedule, StepDataset


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
