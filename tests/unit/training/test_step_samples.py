from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_train.training.options import TrainOptions
from moe_train.training.run_config import RunConfig
from moe_train.training.step_samples import samples_of_step

CONFIG = RunConfig(train=TrainOptions(steps=5, global_batch_size=12, micro_batch_size=2))


@pytest.mark.parametrize("processes", [1, 2, 3, 6])
def test_ranks_share_the_samples_of_a_step(tmp_path: Path, processes: int) -> None:
    (tmp_path / "environment.json").write_text(json.dumps({"processes": processes}))
    whole = samples_of_step(CONFIG, tmp_path, 3)
    assert whole == list(range(24, 36))
    shares = [samples_of_step(CONFIG, tmp_path, 3, rank) for rank in range(processes)]
    assert sorted(sample for share in shares for sample in share) == whole
    # The first micro-batches of all ranks come before the second ones.
    assert [share[:2] for share in shares] == [[24 + 2 * rank, 25 + 2 * rank] for rank in range(processes)]
    assert samples_of_step(CONFIG, tmp_path, 3, 0, processes=6) == [24, 25]


def test_bad_input(tmp_path: Path) -> None:
    for step in (0, 6, -1):
        with pytest.raises(ValueError, match=f"steps 1 to 5, not {step}"):
            samples_of_step(CONFIG, tmp_path, step)
    with pytest.raises(ValueError, match="give --processes"):
        samples_of_step(CONFIG, tmp_path, 1, 0)
    with pytest.raises(ValueError, match="ranks 0 to 2, not 3"):
        samples_of_step(CONFIG, tmp_path, 1, 3, processes=3)
    with pytest.raises(ValueError, match="needs --rank"):
        samples_of_step(CONFIG, tmp_path, 1, None, processes=3)
    with pytest.raises(ValueError, match="not divisible"):
        samples_of_step(CONFIG, tmp_path, 1, 0, processes=5)
