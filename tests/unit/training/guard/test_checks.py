from __future__ import annotations

import pytest

from moe_train.config.errors import ConfigError
from moe_train.training.run_config import load_run_config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("guard.window=1", "guard.window: must be at least 2"),
        ("guard.threshold=0", "guard.threshold: must be a number greater than 0"),
        ("guard.max_skips=-1", "guard.max_skips: must be at least 0"),
        ("guard.spike=rewind", "guard.spike: rewind goes back to the latest checkpoint: set checkpoint.every_steps"),
        ("guard.non_finite=ignore", "guard.non_finite"),
    ],
)
def test_what_is_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_run_config("tiny", ["checkpoint.every_steps=0", override])
    assert message in str(error.value)


def test_rewinds_with_checkpoints() -> None:
    config = load_run_config("tiny", ["checkpoint.every_minutes=5", "guard.spike=rewind", "guard.non_finite=rewind"])
    assert config.guard.spike == "rewind"
