"""What a line of metrics says of updates that were left out."""

from __future__ import annotations

import pytest

from align.training.metrics import LeftOut


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (0, {"loss": 0.6, "grad_norm": 1.0}),
        (1, {"loss": 0.8, "grad_norm": 1.0, "update/left_out": 0.25}),
        (4, {"update/left_out": 1.0}),
    ],
)
def test_the_loss_is_that_of_the_updates_that_were_made(count: int, expected: dict[str, float]) -> None:
    left_out, logs = LeftOut(count, since=8), {"loss": 0.6, "grad_norm": 1.0}
    left_out.correct(logs, 12)
    assert logs == pytest.approx(expected)
    assert left_out == LeftOut(0, since=12)
