"""Fixtures that every folder of tests may use."""

# First: what is imported after it is checked.
import tests.shape_checks  # noqa: F401

# isort: split
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from cola_train.data.batch import Batch
from cola_train.families.cola.checkpoint import ColaCheckpoint
from cola_train.training.callbacks.plots import draw_losses
from tests.helpers.golden import NAMES, Golden
from tests.helpers.runs import baseline_config, joint_config, prepared_folder, vae_config
from tests.helpers.tiny import make_batch, random_tokens, tiny_checkpoint, tiny_dit, tiny_vae

# fixtures that pytest finds here
__all__ = ["baseline_config", "joint_config", "prepared_folder", "vae_config"]

# No deadline: a busy machine is not a bug. The same examples every time: neither is an unlucky
# draw.
settings.register_profile("tests", deadline=None, derandomize=True, database=None)
settings.load_profile("tests")

# The first of them takes minutes, the last half a minute.
_LONGEST = [
    "test_readme.py",
    "test_chaos.py",
    "test_strikes.py",
    "test_memory.py",
    "test_faults.py",
    "test_strategies.py",
    "test_dry_run.py",
    "test_launching.py",
    "test_python_guide.py",
    "test_in_loop_evaluation.py",
    "test_options.py",
    "test_evaluate.py",
    "test_run.py",
    "test_checkpoint.py",
    "test_third_party.py",
]

# The networks here are so small that threads only get in each other's way.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: two processes that take file by file (scripts/test.sh) then end at
    about the same time.
    """
    items.sort(
        key=lambda item: (
            _LONGEST.index(item.path.name) if item.path.name in _LONGEST else len(_LONGEST)
        )
    )


@pytest.fixture(autouse=True, scope="session")
def _no_loss_plots() -> Iterator[None]:
    """A plot of its losses takes longer than a small training's steps: only tests that ask for
    `loss_plots` have them drawn.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cola_train.training.callbacks.metrics.draw_losses", lambda *paths: None)
        yield


@pytest.fixture
def loss_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs draw their losses, as they do for users."""
    monkeypatch.setattr("cola_train.training.callbacks.metrics.draw_losses", draw_losses)


_SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference material that lies beside the repository, where there is one."""
    if not _SHARED.is_dir():
        pytest.skip("no folder `shared` beside the repository")
    return _SHARED


@pytest.fixture(scope="session", params=NAMES)
def golden(request: pytest.FixtureRequest) -> Golden:
    """Each of the three reference checkpoints; read only."""
    folder = _SHARED / "golden" / request.param
    if not folder.is_dir():
        pytest.skip(
            "no released numbers in ../shared/golden; tests/test_golden_set.py proves the same "
            "arithmetic by figures that were written when it agreed with them "
            "(tests/golden/README.md)"
        )
    return Golden.load(folder)


@pytest.fixture
def checkpoint() -> ColaCheckpoint:
    """A VAE with one token a latent, a DiT with blocks of 4 latents and a tokenizer of 29 words,
    ready to sample from.
    """
    return tiny_checkpoint(tiny_vae(), tiny_dit())


@pytest.fixture
def six_rows() -> Batch:
    """Rows of 24 tokens with padding of several lengths, one of padding alone; documents that start
    on multiples of 8.
    """
    seq_len = 24
    starts = torch.tensor([[0, 0, 1], [0, 1, 1], [0, 0, 0], [0, 1, 2], [0, 1, 2], [0, 0, 1]])
    documents = starts.repeat_interleave(seq_len // 3, dim=1)
    return make_batch(random_tokens(6, seq_len, seed=90), [0, 3, seq_len, 10, 0, 1], documents)
