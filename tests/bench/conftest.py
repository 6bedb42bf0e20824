"""A run and a checkpoint so small that measuring them takes a moment."""

from pathlib import Path

import pytest

from cola_train.config.load import load_config, to_yaml
from cola_train.families.cola.config import JointRunConfig
from tests.helpers.runs import SMALL, SMALL_DIT
from tests.helpers.tiny import calm, tiny_checkpoint, tiny_dit, tiny_vae


@pytest.fixture
def tiny_run(tmp_path: Path) -> Path:
    """The config file of a stage-2 run of 4 rows of 32 tokens."""
    config = load_config(
        JointRunConfig,
        None,
        [*SMALL, *SMALL_DIT, "name=tiny", "data.path=none", "objective.reference_weight=0"],
    )
    path = tmp_path / "tiny.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder with a DiT of blocks of 4."""
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    tiny_checkpoint(tiny_vae(), calm(tiny_dit())).save(folder)
    return folder
