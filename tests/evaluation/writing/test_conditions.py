"""Figures stand side by side only if what they depend on besides the model is the same."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cola_train.config.sampling import SamplerConfig
from cola_train.config.settings import UserError
from cola_train.evaluation.writing.conditions import CONDITIONS, conditions_of, refuse_apart
from cola_train.evaluation.writing.config import ComparisonConfig
from cola_train.evaluation.writing.ngram import NgramJudge
from cola_train.families.autoregressive.checkpoint import AutoregressiveCheckpoint
from cola_train.families.cola.checkpoint import ColaCheckpoint
from cola_train.families.masked_diffusion.checkpoint import MaskedDiffusionCheckpoint
from cola_train.scaling import curve
from cola_train.scaling.config import CurveConfig
from cola_train.scaling.curve import comparison_of, measured
from tests.scaling.test_ladder import read, write_spec

COLA, AR, LLADA = (
    kind.solver_settings
    for kind in (ColaCheckpoint, AutoregressiveCheckpoint, MaskedDiffusionCheckpoint)
)


def conditions(
    settings: frozenset[str], row_tokens: int = 64, judge: str = "a", **sampler: Any
) -> dict[str, Any]:
    config = ComparisonConfig(sampler=SamplerConfig(**sampler))
    return {**conditions_of(config, row_tokens, settings), "judge": judge}


def test_what_plays_no_part_in_a_family_keeps_nothing_apart() -> None:
    refuse_apart(
        [
            ("ar", conditions(AR, num_steps=4)),
            ("cola", conditions(COLA, num_steps=16, seed=3, batch_size=2, max_new_tokens=9)),
            ("cola2", conditions(COLA, num_steps=16)),
            ("llada", conditions(LLADA, num_steps=16)),
        ],
        "",
    )
    refuse_apart([("old", None), ("older", None)], "")


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (conditions(COLA), conditions(COLA, judge="b"), r"judge \(b for two, a for one\)\. Do"),
        (conditions(COLA), conditions(AR, row_tokens=32), r"row_tokens \(32 for two, 64 for one"),
        (
            conditions(COLA),
            conditions(COLA, solver="heun", num_steps=8),
            r"sampler.num_steps \(8 .*; sampler.solver \(heun for two, euler for one\)\.",
        ),
        (conditions(COLA), conditions(COLA, noise_scale=0.5), r"sampler.noise_scale \(0.5"),
        (conditions(AR), conditions(AR, temperature=0.7), r"sampler.temperature \(0.7"),
        (None, conditions(AR), r"known \(True for two, False for one\)"),
    ],
)
def test_what_differs_is_named(
    first: dict[str, Any] | None, second: dict[str, Any], message: str
) -> None:
    # As they are read from metrics.jsonl.
    second = json.loads(json.dumps(second))
    with pytest.raises(UserError, match=message):
        refuse_apart([("one", first), ("ar", first), ("two", second)], "Do so.")


def test_a_judge_is_named_by_all_that_it_learnt() -> None:
    rows = np.random.default_rng(0).integers(1, 9, (20, 8))
    other = rows.copy()
    other[3, 4] = other[3, 4] % 8 + 1
    same, *others = (
        NgramJudge.train(text, size, 0, order).sha256()
        for text, size, order in ((rows, 9, 3), (other, 9, 3), (rows, 10, 3), (rows, 9, 2))
    )
    assert same == NgramJudge.train(rows.copy(), 9, 0, 3).sha256()
    assert len({same, *others}) == 4


def test_points_of_a_curve_that_were_compared_otherwise_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"one": ["transformer.num_hidden_layers=1"]}
    families = {"ar": {"config": "ar.yaml", "sizes": sizes}}
    spec, planned_runs = read(write_spec(tmp_path, "data", families=families))
    assert isinstance(spec, CurveConfig)
    points = [planned for planned in planned_runs if planned.is_point]
    monkeypatch.setattr(curve, "is_finished", lambda run: True)
    monkeypatch.setattr(curve, "read_run_config", lambda run: points[0].config)

    def compare(name: str, judge: str) -> None:
        row = {"step": 5, "comparison/x": 1.5, CONDITIONS: conditions(AR, judge=judge)}
        with (Path(spec.folder) / name / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    for planned in points:
        folder = Path(spec.folder) / planned.name
        folder.mkdir(parents=True)
        spent = {f"eflops_{name}": 1e-10 for name in ("paper", "model", "executed")}
        line = json.dumps({"step": 5, "tokens": 10, **spent})
        (folder / "metrics.jsonl").write_text(line + "\n", encoding="utf-8")
    assert comparison_of(folder) is None
    compare(points[0].name, "a")
    compare(points[1].name, "b")
    with pytest.raises(UserError, match=rf"judge \(b for .*{points[1].name}, a for .*; its newest"):
        measured(spec, planned_runs)
    # The newest of a run counts.
    compare(points[1].name, "a")
    assert [point.metrics for point in measured(spec, planned_runs)] == [{"x": 1.5}] * 2
