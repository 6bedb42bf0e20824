"""A plan says what the ledger, the parameters and the memory estimate say; the paper's figures come
out.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from cola_train.config.settings import UserError
from cola_train.data.packing import TRAIN
from cola_train.data.prepared import PreparedData
from cola_train.families.cola.config import JointRunConfig
from cola_train.families.costs import flops_after, step_flops
from cola_train.families.registry import load_run_config
from cola_train.families.transformer.family import BaselineRunConfig
from cola_train.scaling import plan
from cola_train.scaling.memory import MemoryEstimate
from cola_train.scaling.plan import Fleet, make_plan, show

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
FLEET = Fleet("H100", count=8, per_node=8, mfu=0.45, price=2.5)


@pytest.fixture
def without_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the dry run, which takes its time at the paper's size; tests/test_readme.py has
    it.
    """
    monkeypatch.setattr(plan, "estimate", lambda *arguments: MemoryEstimate({}, 0))
    monkeypatch.setattr(plan, "what_fits", lambda *arguments: [])


@pytest.mark.usefixtures("without_memory")
def test_the_papers_plan() -> None:
    config = load_run_config(
        CONFIGS / "paper" / "joint.yaml", ["budget.eflops=2000", "budget.convention=paper"]
    )
    text = show(make_plan(config, FLEET, ["10000", "15000", "250000"]), as_json=False)
    for line in (
        "vae 501,871,574",
        "dit 1,829,875,728",
        "paper 7,785,676,800,000,000 7.7857e+15",
        "Budget: 2,000.0 EFLOPs (paper), reached at step 256,882",
    ):
        assert line in " ".join(text.split())
    rows = [line.split() for line in text.splitlines()]
    eflops = {row[0]: row[3] for row in rows if len(row) == 9 and row[0][0].isdigit()}
    assert eflops == {
        "10,000": "77.86",
        "15,000": "116.79",
        "250,000": "1,946.42",
        "256,882": "2,000.00",
    }


@pytest.mark.usefixtures("without_memory")
@pytest.mark.parametrize("stage, embeddings", [("ar", 410_738_688), ("llada", 410_738_688 + 2048)])
def test_the_papers_baselines(stage: str, embeddings: int) -> None:
    found = make_plan(load_run_config(CONFIGS / "paper" / f"{stage}.yaml"), FLEET, [])
    parameters = found["parameters"]
    assert parameters["backbone"] == 1_812_051_968
    assert parameters["transformer.embedding"] + parameters["transformer.head"] == embeddings
    assert found["step_flops"]["paper"] == 6 * 1_800_000_000 * 720_896


def test_a_plan_is_the_arithmetic_of_its_parts(joint_config: Callable[..., JointRunConfig]) -> None:
    marks = "budget.marks=[4 steps,every 1024 tokens]"
    config = joint_config(
        "run",
        "trainer.max_steps=20",
        "trainer.micro_batch_size=1",
        "trainer.global_batch_size=8",
        marks,
    )
    fleet = Fleet("A100", count=2, per_node=2, mfu=0.5, price=3.0)
    found = json.loads(show(make_plan(config, fleet, ["7"]), as_json=True))
    moments = {moment["steps"]: moment for moment in found["moments"]}
    # 1,024 tokens are four steps of 8 rows of 32: every fourth is a mark.
    assert sorted(moments) == [4, 7, 8, 12, 16, 20]
    assert found["step_flops"] == step_flops(config, 0)
    parts = found["step_flops_by_part"]
    assert (
        sum(work["model_forward"] + work["model_backward"] for work in parts.values())
        == found["step_flops"]["model"]
    )
    model = flops_after(config, 20)["model"]
    assert moments[20]["eflops"]["model"] == model / 1e18
    # the config is fp32
    assert moments[20]["device_hours"] == pytest.approx(model / (0.5 * 19.5e12) / 3600)
    assert moments[20]["cost"] == pytest.approx(3 * moments[20]["device_hours"])
    assert moments[20]["epochs"] == pytest.approx(
        160 / PreparedData.open(config.data.path).num_rows(TRAIN)
    )
    assert found["memory"]["peak"] <= sum(found["memory"]["parts"].values())
    assert found["memory"]["fits"]
    # all of a device's rows
    assert {option["micro_batch_size"] for option in found["what_fits"]} == {4}


@pytest.mark.parametrize(
    "fleet, message",
    [
        (("H10", 8, 8, 0.4, None), "no device 'H10' in the table of peaks"),
        (("H100", 0, 8, 0.4, None), "--devices and --per-node must be at least 1, not 0"),
        (("H100", 8, 8, 1.4, None), r"--mfu must be in \(0, 1\], not 1.4"),
        (("H100", 8, 8, 0.4, -1.0), "--price must be 0 or more, not -1.0"),
    ],
)
def test_a_fleet_that_cannot_be_is_refused(
    fleet: tuple[str, int, int, float, float | None], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        Fleet(*fleet)


def test_devices_that_the_batch_does_not_divide_among_are_refused(
    baseline_config: Callable[..., BaselineRunConfig],
) -> None:
    config = baseline_config("ar", "run")
    with pytest.raises(UserError, match="global_batch_size"):
        make_plan(config, Fleet("H100", 3, 8, 0.4, None), [])
