"""Any number of processes, any mesh and any accumulation give the same run: samples, noise and
losses.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from cola_train.cli import main
from cola_train.config.load import to_yaml
from cola_train.config.run import RunConfig
from cola_train.config.settings import UserError
from cola_train.families.cola.config import JointRunConfig, VAERunConfig
from cola_train.operations.launch import launch
from cola_train.processes import Processes
from cola_train.run_folder import Status, write_status
from cola_train.training.loop.step_log import Step, read_step_log
from cola_train.training.parallel.sharding import check_mesh
from tests.helpers.programs import as_torchrun, cola_train
from tests.helpers.runs import SMALL, figures

STEPS = 8
# Prompt blocks and short documents give rows different numbers of counted positions: means of means
# would differ from the mean.
UNEVEN = {"vae": ["objective.mask_ratio=0.3"], "joint": ["objective.flow.prompt_block_prob=0.5"]}
# By processes: strategy, shard size, and the micro-batches a step of stage 1 and of stage 2. Each
# kind of mesh has one step of one micro-batch and one of four, in one stage or the other.
MESHES = {
    1: [("single", None, {"vae": 1, "joint": 1}), ("single", None, {"vae": 4, "joint": 4})],
    2: [("ddp", None, {"vae": 1, "joint": 4}), ("fsdp2", None, {"vae": 4, "joint": 1})],
    4: [("fsdp2", None, {"vae": 1, "joint": 4}), ("hsdp", 2, {"vae": 4, "joint": 1})],
}
ROWS = 16


def configs_of(make: Callable[..., RunConfig], stage: str, processes: int) -> dict[str, RunConfig]:
    configs = {}
    for strategy, shard_size, micro_batches in MESHES[processes]:
        accumulation = micro_batches[stage]
        name = f"{stage}-{processes}-{strategy}-{accumulation}"
        configs[name] = make(
            name,
            *UNEVEN[stage],
            f"trainer.global_batch_size={ROWS}",
            f"trainer.max_steps={STEPS}",
            "optim.decay=100",
            f"trainer.micro_batch_size={ROWS // processes // accumulation}",
            f"parallel.strategy={strategy}",
            f"parallel.shard_size={'null' if shard_size is None else shard_size}",
            "checkpoint.every_steps=1000",
            "trainer.validate_every_steps=4",
        )
    return configs


def train_all(configs: dict[str, RunConfig], processes: int, tmp_path: Path) -> None:
    folders = []
    for name, config in configs.items():
        folder = tmp_path / "configs" / name
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
        folders.append(str(folder))
    done = as_torchrun(processes, "tests.training.worker", *folders)
    assert done.returncode == 0, done.stderr[-3000:]


def draws(run: Path) -> dict[str, int]:
    merged: dict[str, int] = {}
    for path in run.glob("draws-*.json"):
        merged |= json.loads(path.read_text())
    return merged


def steps(run: Path) -> list[Step]:
    return [entry for entry in read_step_log(run) if isinstance(entry, Step)]


@pytest.mark.slow
def test_processes_meshes_and_accumulation_do_not_change_a_run(
    vae_config: Callable[..., VAERunConfig],
    joint_config: Callable[..., JointRunConfig],
    tmp_path: Path,
) -> None:
    names: list[str] = []
    for processes in MESHES:
        configs = configs_of(vae_config, "vae", processes) | configs_of(
            joint_config, "joint", processes
        )
        train_all(configs, processes, tmp_path)
        names += configs
    worst: dict[str, float] = {}
    for stage in ("vae", "joint"):
        reference = tmp_path / f"{stage}-1-single-1"
        expected_draws, expected_steps = draws(reference), steps(reference)
        assert len(expected_steps) == STEPS
        # Each training sample's draws were recorded: two or more purposes a sample, and none that
        # another sample shares.
        assert len(expected_draws) > 2 * STEPS * ROWS
        expected = figures(reference)
        for name in names:
            if not name.startswith(stage):
                continue
            assert draws(tmp_path / name) == expected_draws, name
            assert steps(tmp_path / name) == expected_steps, name
            found = figures(tmp_path / name)
            assert found.keys() == expected.keys(), name
            for key, value in expected.items():
                if key[1].endswith("/loss"):
                    worst[name] = max(worst.get(name, 0.0), abs(found[key] - value) / abs(value))
            assert found == pytest.approx(expected, rel=2e-4, abs=2e-5), name
    print(json.dumps(worst, indent=1))  # shown by -s, and where the next line fails
    assert max(worst.values()) < 1e-5


@pytest.mark.parametrize(
    ("overrides", "world_size", "message"),
    [
        (["parallel.strategy=single"], 2, r"strategy=single is for one process, not 2"),
        (
            ["parallel.strategy=hsdp", "parallel.shard_size=3"],
            4,
            r"shard_size \(3\) must divide the number of processes \(4\)",
        ),
    ],
)
def test_meshes_that_do_not_fit(
    vae_config: Callable[..., VAERunConfig], overrides: list[str], world_size: int, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check_mesh(vae_config("x", *overrides).parallel, Processes(0, world_size, 0, world_size))


def test_a_shard_size_without_hsdp_is_refused(vae_config: Callable[..., VAERunConfig]) -> None:
    with pytest.raises(
        UserError, match=r"parallel.shard_size is for parallel.strategy=hsdp, not fsdp2"
    ):
        vae_config("x", "parallel.shard_size=2")


def test_the_launcher_is_the_users_way_to_several_processes(
    joint_config: Callable[..., JointRunConfig], tmp_path: Path
) -> None:
    config = joint_config(
        "two", "parallel.num_processes=2", "trainer.micro_batch_size=2", "trainer.max_steps=2"
    )
    (tmp_path / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    done = cola_train("joint", str(tmp_path / "config.yaml"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "two" / "hf" / "cola_dlm" / "cola_dit").is_dir()
    # Every process but the first writes into the run's folder, not over the first one's progress.
    assert list((tmp_path / "two" / "logs").rglob("rank-1.log"))
    assert done.stderr.count("training:") == done.stderr.count("2/2") + done.stderr.count("0/2")
    refused = cola_train("joint", str(tmp_path / "config.yaml"), "seed=5", cwd=tmp_path)
    assert refused.returncode == 2
    assert refused.stderr.startswith("cola-train: error: ")
    assert "holds another run" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1


def test_a_folder_for_logs_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"/file/logs/.* cannot be made: Not a directory. Choose"):
        launch(["vae"], 2, tmp_path / "file", uses_gpu=False)


@pytest.mark.parametrize("status, expected", [(137, 137), (143, 0), (1, 0)])
def test_a_run_whose_process_was_killed_is_no_success_even_if_it_had_finished(
    status: int,
    expected: int,
    prepared_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def launched(arguments: Sequence[str], number: int, folder: Path, *, uses_gpu: bool) -> int:
        folder.mkdir()
        write_status(folder, Status("finished", 6))
        return status

    monkeypatch.setattr("cola_train.operations.launch.launch", launched)
    places = ["name=run", f"data.path={prepared_folder}", f"runs_folder={tmp_path}"]
    two = ["parallel.num_processes=2", "trainer.micro_batch_size=2"]
    assert main(["vae", *SMALL, *places, *two]) == expected
