"""A branch goes on from a saved step of another run, as that run would have gone on with the
branch's schedule.
"""

from collections.abc import Callable
from pathlib import Path

import pytest

from cola_train.config.settings import UserError
from cola_train.families.cola.config import VAERunConfig
from cola_train.operations.audit import audit
from cola_train.run_folder import Status, read_status
from cola_train.training.branch import branch
from cola_train.training.checkpoints.folder import saved_steps
from cola_train.training.run import train
from tests.helpers.programs import as_torchrun
from tests.helpers.runs import figures, saved_tensors

STABLE = [
    "optim.schedule=wsd",
    "trainer.validate_every_steps=5",
    "optim.anneal=1",
    "optim.decay=1000000",
    "budget.marks=[5 steps]",
]
END = ["trainer.max_steps=9", "optim.decay=9", "optim.anneal=4", "budget.marks=[]"]
Configs = Callable[..., VAERunConfig]


@pytest.fixture
def trunk(vae_config: Configs) -> Path:
    config = vae_config("trunk", "trainer.max_steps=7", *STABLE)
    train(config)
    return Path(config.runs_folder) / "trunk"


def test_a_branch_is_the_run_that_had_its_schedule_all_along(
    vae_config: Configs, trunk: Path
) -> None:
    straight = vae_config("straight", *STABLE, *END)
    train(straight)
    config = branch(trunk, 5, ["name=anneal", *END])
    assert config.branched_from == f"{trunk}/step-5"
    assert train(config).step == 9
    ours, theirs = trunk.parent / "anneal", trunk.parent / "straight"
    assert all(
        value.equal(saved_tensors(theirs)[name]) for name, value in saved_tensors(ours).items()
    )
    assert figures(ours) == figures(theirs)
    assert audit(ours) == 0
    # The trunk's mark is the trunk's: the branch neither keeps nor exports it.
    assert not (ours / "marks").exists()
    assert saved_steps(trunk) == [5, 6, 7]


def test_the_same_call_goes_on_with_a_branch(trunk: Path) -> None:
    for _ in range(2):
        config = branch(trunk, 5, ["name=anneal", *END])
        assert train(config).step == 9


def test_a_branch_with_nothing_left_to_do_says_so(
    trunk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert train(branch(trunk, None, ["name=as_it_is", "budget.marks=[]"])).step == 7
    said = capsys.readouterr().err
    assert "as_it_is: 7 steps, 896 tokens, EFLOPs " in said
    assert (trunk.parent / "as_it_is" / "hf").is_dir()


@pytest.mark.parametrize(
    "step, overrides, message",
    [
        (4, END, r"has no checkpoint of step 4; it has \[5, 6, 7\]"),
        (
            5,
            [*END, "optim.anneal=6"],
            (
                "rate is not that of the run it comes from at step 4, before it branches off at "
                "step 5"
            ),
        ),
        (5, [*END, "seed=3"], "cannot differ from it in seed: 66, now 3"),
        (5, [*END, "optim.learning_rate=1"], "cannot differ from it in optim.learning_rate"),
    ],
)
def test_what_cannot_be_a_branch_is_refused(
    trunk: Path, step: int, overrides: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        branch(trunk, step, ["name=anneal", *overrides])
    assert not (trunk.parent / "anneal").exists()


@pytest.mark.slow
def test_several_processes_make_one_branch(trunk: Path) -> None:
    changes = ["name=anneal", *END, "trainer.micro_batch_size=2"]
    done = as_torchrun(2, "cola_train", "branch", str(trunk), "--step", "5", *changes)
    assert done.returncode == 0, done.stderr[-3000:]
    assert read_status(trunk.parent / "anneal") == Status("finished", 9)
    assert audit(trunk.parent / "anneal") == 0


def test_another_run_is_not_overwritten(vae_config: Configs, trunk: Path) -> None:
    train(vae_config("taken"))
    with pytest.raises(UserError, match="holds another run, which is not overwritten"):
        branch(trunk, 5, ["name=taken", *END])
