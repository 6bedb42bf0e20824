"""What the watchdog sees, for it alone can end a process that waits for another without end."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed as dist

from cola_train.families.cola.config import VAERunConfig
from cola_train.training.run import train


def test_groups_are_made_where_the_watchdog_looks(
    vae_config: Callable[..., VAERunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch waits half an hour for another process that never comes to make one."""
    make, watched = dist.new_group, []

    def seen(*arguments: Any, **options: Any) -> Any:
        watched.append("watchdog" in [thread.name for thread in threading.enumerate()])
        return make(*arguments, **options)

    monkeypatch.setattr(dist, "new_group", seen)
    train(vae_config("run", "trainer.max_steps=1"))
    assert watched
    assert all(watched)
