"""What a training keeps: when it counts as diverged, and checkpoints that count only when whole."""

from __future__ import annotations

import pytest

from asdm_compress.core.errors import AsdmError
from asdm_compress.distillation.checkpoints import Checkpoints
from asdm_compress.distillation.state import TrainingState


def test_divergence_is_judged_by_the_smoothed_loss():
    state = TrainingState()
    for loss in (1.0, 0.9, 0.8, 0.9, 0.8, 0.85, 3.0, 0.8, 0.7):
        state.judge(loss, lambda: "…")
    with pytest.raises(AsdmError, match=r"diverges.*step 40"):
        for _ in range(9):
            state.judge(60.0, lambda: "the last good checkpoint is of step 40")
    with pytest.raises(AsdmError, match="no number"):
        TrainingState().judge(float("nan"), lambda: "…")


def test_checkpoints_count_only_when_whole(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3):
        checkpoints.aside(step).mkdir(parents=True)
        (checkpoints.aside(step) / "weights").write_text(str(step))
        checkpoints.commit(step)
    checkpoints.aside(4).mkdir()
    assert checkpoints.steps() == [2, 3]
    assert checkpoints.last() == 3
    checkpoints.tidy()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]
