"""Evaluation while a run trains: the verbs' own figures, on any number of processes, and training
as if it had not been.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cola_train.config.load import to_yaml
from cola_train.config.settings import UserError
from cola_train.data.prepared import PreparedData
from cola_train.evaluation.benchmarks.answering import answer
from cola_train.evaluation.benchmarks.results import accuracies
from cola_train.evaluation.benchmarks.tasks import read_samples
from cola_train.evaluation.likelihood.likelihood import log_likelihoods
from cola_train.evaluation.likelihood.perplexity import held_out_rows
from cola_train.evaluation.likelihood.rates import perplexity_of
from cola_train.families.checkpoint import Checkpoint, Inspection
from cola_train.families.cola.checkpoint import ColaCheckpoint
from cola_train.families.cola.config import JointRunConfig, VAERunConfig
from cola_train.families.registry import load_checkpoint
from cola_train.families.transformer.family import BaselineRunConfig
from cola_train.json_lines import read_log
from cola_train.run_layout import folder_of
from cola_train.training.callbacks.in_loop_evaluation import InLoopEvaluation
from cola_train.training.run import train
from tests.helpers.benchmarks import make_samples, write_samples
from tests.helpers.programs import as_torchrun
from tests.helpers.runs import figures

SMALL = [
    "in_loop_eval.inspection.num_rows=4",
    "in_loop_eval.inspection.num_steps=2",
    "in_loop_eval.inspection.map_latents=8",
    "in_loop_eval.likelihood.num_rows=2",
    "in_loop_eval.likelihood.num_steps=2",
    "in_loop_eval.likelihood.num_samples=2",
    "in_loop_eval.benchmarks.sampler.num_steps=2",
    "in_loop_eval.benchmarks.sampler.max_new_tokens=4",
    "in_loop_eval.tasks=[lambada,obqa]",
    "in_loop_eval.benchmarks.num_samples=3",
]
ALL = "in_loop_eval.evaluators=[inspection,likelihood,benchmarks]"
PREFIXES = ("inspection/", "likelihood/", "benchmarks/")


@pytest.fixture
def benchmark_data(tmp_path: Path) -> Path:
    for task in ("lambada", "obqa"):
        write_samples(tmp_path / "benchmarks", task, make_samples(task, 5))
    return tmp_path / "benchmarks"


def watched(run: Path) -> dict[int, dict[str, float]]:
    """What was evaluated after each step."""
    return {
        row["step"]: {name: value for name, value in row.items() if name.startswith(PREFIXES)}
        for row in read_log(run / "metrics.jsonl")
        if any(name.startswith(PREFIXES) for name in row)
    }


def inspected(checkpoint: Checkpoint, *arguments: Any) -> Inspection:
    """What is found, without what comes after each batch."""
    *_, found = checkpoint.inspect(*arguments)
    assert found is not None
    return found


def by_hand(config: JointRunConfig | BaselineRunConfig) -> dict[str, float]:
    """The same from the run's export, by the functions of the verbs."""
    checkpoint, data, settings = (
        load_checkpoint(folder_of(config)),
        PreparedData.open(config.data.path),
        config.in_loop_eval,
    )
    found: dict[str, float] = {}
    if isinstance(checkpoint, ColaCheckpoint):
        inspection = inspected(checkpoint, data, settings.inspection)
        found |= {f"inspection/{name}": value for name, value in inspection.metrics().items()}
    rows = held_out_rows(data, settings.likelihood.num_rows, mask_documents=False)
    likelihood = perplexity_of(
        checkpoint, log_likelihoods(checkpoint, rows, settings.likelihood), settings.likelihood
    )
    found |= {f"likelihood/{name}": value for name, value in likelihood.metrics().items()}
    assert settings.benchmark_data is not None
    answers = [
        one
        for task in settings.tasks
        for one in answer(
            checkpoint,
            task,
            read_samples(Path(settings.benchmark_data), task)[:3],
            settings.benchmarks,
        )
    ]
    return found | {f"benchmarks/{name}": value for name, value in accuracies(answers).items()}


def test_stage_2_is_evaluated_as_its_export_is_and_trains_as_if_it_were_not(
    joint_config: Callable[..., JointRunConfig], benchmark_data: Path
) -> None:
    plain = joint_config("plain")
    config = joint_config(
        "watched",
        *SMALL,
        ALL,
        f"in_loop_eval.benchmark_data={benchmark_data}",
        "in_loop_eval.every_steps=3",
    )
    for each in (plain, config):
        assert train(each).state == "finished"
    found = watched(folder_of(config))
    assert [*found] == [3, 6]
    assert found[3] != found[6]
    assert (folder_of(config) / "evaluations.png").read_bytes().startswith(b"\x89PNG")
    assert found[6] == pytest.approx(by_hand(config), rel=1e-6, nan_ok=True)
    with_, without = (load_checkpoint(folder_of(each)) for each in (config, plain))
    assert isinstance(with_, ColaCheckpoint)
    assert isinstance(without, ColaCheckpoint)
    assert with_.dit is not None
    assert without.dit is not None
    for ours, theirs in ((with_.vae, without.vae), (with_.dit, without.dit)):
        assert all(
            torch.equal(value, theirs.state_dict()[name])
            for name, value in ours.state_dict().items()
        )
    trained = {
        key: value
        for key, value in figures(folder_of(config)).items()
        if not key[1].startswith(PREFIXES)
    }
    assert trained == figures(folder_of(plain))


@pytest.mark.parametrize("stage", ["ar", "llada"])
def test_a_baseline_is_evaluated_at_a_mark(
    stage: str, baseline_config: Callable[..., BaselineRunConfig], benchmark_data: Path
) -> None:
    config = baseline_config(
        stage,
        "run",
        *SMALL,
        "in_loop_eval.evaluators=[likelihood,benchmarks]",
        f"in_loop_eval.benchmark_data={benchmark_data}",
        "in_loop_eval.at_marks=true",
        "budget.marks=['6 steps']",
    )
    train(config)
    found = watched(folder_of(config))
    assert [*found] == [6]
    assert found[6] == pytest.approx(by_hand(config), rel=1e-6)


def test_stage_2_measures_its_drift_from_stage_1(
    vae_config: Callable[..., VAERunConfig], joint_config: Callable[..., JointRunConfig]
) -> None:
    stage1 = vae_config("stage1", *SMALL, "in_loop_eval.every_steps=6")
    train(stage1)
    (found,) = watched(folder_of(stage1)).values()
    assert {"inspection/vae_log_snr", "inspection/active_units"} <= found.keys()
    assert "inspection/flow_mse" not in found
    overrides = [
        f"init_vae_from={folder_of(stage1)}",
        "objective.reference_weight=0.01",
        "in_loop_eval.every_steps=2",
    ]
    config = joint_config("stage2", *SMALL, *overrides)
    train(config)
    drift = [
        values["inspection/reference_kl_nats_per_token"]
        for values in watched(folder_of(config)).values()
    ]
    assert len(drift) == 3
    assert min(drift) > 0
    reference, checkpoint = (load_checkpoint(folder_of(each)) for each in (stage1, config))
    assert isinstance(reference, ColaCheckpoint)
    assert isinstance(checkpoint, ColaCheckpoint)
    inspection = inspected(
        checkpoint, PreparedData.open(config.data.path), config.in_loop_eval.inspection, reference
    )
    assert drift[2] == pytest.approx(inspection.metrics()["reference_kl_nats_per_token"], rel=1e-5)


def test_a_run_that_is_asked_to_stop_leaves_an_evaluation_and_does_it_when_it_goes_on(
    joint_config: Callable[..., JointRunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = joint_config("run", *SMALL, "in_loop_eval.every_steps=4")
    whole, inspect = (
        joint_config("whole", *SMALL, "in_loop_eval.every_steps=4"),
        ColaCheckpoint.inspect,
    )
    train(whole)
    all_know = InLoopEvaluation._all_know

    def asked_amid(self: InLoopEvaluation, module: Any, done: bool) -> tuple[bool, bool]:
        module.stop.signal_name = "SIGTERM"
        return all_know(self, module, done)

    monkeypatch.setattr(InLoopEvaluation, "_all_know", asked_amid)
    assert train(config).state == "interrupted"
    assert watched(folder_of(config)) == {}
    monkeypatch.setattr(InLoopEvaluation, "_all_know", all_know)
    assert inspect is ColaCheckpoint.inspect
    assert train(config).state == "finished"
    assert watched(folder_of(config)) == watched(folder_of(whole))
    assert [*watched(folder_of(config))] == [4]


def test_what_cannot_be_measured_is_said_and_costs_no_run(
    joint_config: Callable[..., JointRunConfig],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def astray(*arguments: object) -> Iterator[None]:
        yield None
        raise UserError("The velocity is not finite.")

    monkeypatch.setattr(ColaCheckpoint, "inspect", astray)
    config = joint_config(
        "run",
        *SMALL,
        "in_loop_eval.every_steps=6",
        "in_loop_eval.evaluators=[inspection,likelihood]",
    )
    assert train(config).state == "finished"
    (found,) = watched(folder_of(config)).values()
    assert {name.split("/")[0] for name in found} == {"likelihood"}
    assert (
        "warning: no inspection after step 6: The velocity is not finite."
        in capsys.readouterr().err
    )


@pytest.mark.slow
def test_two_processes_find_what_one_finds(
    joint_config: Callable[..., JointRunConfig], benchmark_data: Path, tmp_path: Path
) -> None:
    overrides = [
        *SMALL,
        ALL,
        f"in_loop_eval.benchmark_data={benchmark_data}",
        "in_loop_eval.every_steps=6",
        "trainer.micro_batch_size=2",
    ]
    one, two = (joint_config(name, *overrides) for name in ("one", "two"))
    train(one)
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.yaml").write_text(to_yaml(two), encoding="utf-8")
    done = as_torchrun(2, "tests.training.worker", str(tmp_path / "config"))
    assert done.returncode == 0, done.stderr
    assert watched(folder_of(two))[6] == pytest.approx(
        watched(folder_of(one))[6], rel=1e-4, abs=1e-6
    )


@pytest.mark.parametrize(
    "overrides, message",
    [
        (
            ["in_loop_eval.evaluators=[inspecton]"],
            "in_loop_eval.evaluators has an unknown entry 'inspecton'; did you mean 'inspection'?",
        ),
        (
            ["in_loop_eval.every_steps=-1"],
            "in_loop_eval.every_steps must be at least 0, not -1.",
        ),
        (
            [ALL, "in_loop_eval.every_steps=1"],
            "in_loop_eval.evaluators has benchmarks, which need in_loop_eval.benchmark_data",
        ),
        ([ALL, "in_loop_eval.every_steps=1", "in_loop_eval.benchmark_data=nowhere"], "nowhere"),
        (
            [
                ALL,
                "in_loop_eval.every_steps=1",
                "in_loop_eval.benchmark_data=nowhere",
                "in_loop_eval.tasks=[lambda]",
            ],
            "did you mean 'lambada'?",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_the_run_exists(
    joint_config: Callable[..., JointRunConfig], overrides: list[str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as raised:
        train(joint_config("run", *overrides))
    assert message in str(raised.value)
    assert not (tmp_path / "run").exists()


def test_instruments_of_other_stages_are_refused(
    vae_config: Callable[..., VAERunConfig], baseline_config: Callable[..., BaselineRunConfig]
) -> None:
    with pytest.raises(
        UserError,
        match=r"likelihood is not for a run of `cola-train vae`; it can have inspection\.",
    ):
        vae_config("run", "in_loop_eval.every_steps=1", "in_loop_eval.evaluators=[likelihood]")
    with pytest.raises(
        UserError,
        match=(
            r"inspection is not for a run of `cola-train ar`; it can have likelihood, benchmarks\."
        ),
    ):
        baseline_config("ar", "run", "in_loop_eval.every_steps=1")


def test_a_line_of_metrics_is_json_without_nan(joint_config: Callable[..., JointRunConfig]) -> None:
    config = joint_config("run", *SMALL, "in_loop_eval.every_steps=6")
    train(config)
    for line in (folder_of(config) / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(name))
