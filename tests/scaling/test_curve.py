"""A ladder is trained and measured; what is finished is left alone, what is missing is done, what
failed is reported.
"""

import shutil
from pathlib import Path

import pytest

from cola_train.config.load import load_config
from cola_train.config.settings import UserError
from cola_train.families.registry import family_of
from cola_train.scaling.config import CurveConfig
from cola_train.scaling.curve import run_curve
from cola_train.scaling.figure import draw
from cola_train.scaling.fit import write_fit
from cola_train.scaling.ladder import ladder
from cola_train.scaling.points import read_points
from tests.scaling.test_ladder import write_spec


def climb(path: Path, retry: bool = False) -> int:
    return run_curve(load_config(CurveConfig, path), path.parent, retry=retry, parallel=1)


@pytest.mark.slow
def test_a_ladder_is_climbed_once_and_only_what_is_missing_again(
    tmp_path: Path, prepared_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    sizes = {
        "one": ["transformer.num_hidden_layers=1"],
        "mad": ["optim.learning_rate=1e30", "optim.weight_decay=0", "guard.max_skipped_in_a_row=1"],
    }
    path = write_spec(
        tmp_path, prepared_folder, families={"ar": {"config": "ar.yaml", "sizes": sizes}}
    )
    assert climb(path) == 1
    said = capfd.readouterr().err
    assert "ar-mad-trunk failed: cola-train: error: Optimizer step" in said
    assert "2 of 4 points are measured" in said
    assert "Not finished: ar-mad-trunk, ar-mad-3e-10, ar-mad-6e-10" in said
    points = read_points(tmp_path / "curve" / "points.csv")
    planned_runs = {
        planned.name: planned for planned in ladder(load_config(CurveConfig, path), tmp_path)
    }
    for point, name in zip(points, ("ar-one-3e-10", "ar-one-6e-10"), strict=True):
        config = planned_runs[name].config
        assert (point.family, point.size, point.kind, point.budget) == (
            "ar",
            "one",
            "anneal",
            float(name[7:]),
        )
        assert point.parameters == family_of(config).backbone_parameters(config)
        assert point.tokens == config.trainer.max_steps * 4 * 32
        assert point.flops["model"] >= point.budget * 1e18
        assert 0 < point.metrics["judge_nats_per_token"] < 10
    # A failed run is told of again, not trained again, unless asked for.
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "curve").rglob("metrics.jsonl")}
    assert climb(path) == 1
    assert "ar-mad-trunk had failed at step" in capfd.readouterr().err
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert climb(path, retry=True) == 1
    assert "ar-mad-trunk: training" in capfd.readouterr().err

    first = (tmp_path / "curve" / "points.csv").read_bytes()
    shutil.rmtree(tmp_path / "curve" / "ar-one-3e-10")
    assert climb(path) == 1
    assert [line for line in capfd.readouterr().err.splitlines() if "training" in line] == [
        "ar-one-3e-10: training, 49 steps"
    ]
    assert (tmp_path / "curve" / "points.csv").read_bytes() == first
    assert "a power law needs at least 4 budgets of different FLOPs, and there are 2" in write_fit(
        load_config(CurveConfig, path)
    )
    assert all(file.stat().st_size > 1000 for file in draw(load_config(CurveConfig, path)))


def test_missing_data_is_said_before_anything_is_trained(tmp_path: Path) -> None:
    path = write_spec(tmp_path, tmp_path / "nowhere")
    with pytest.raises(UserError, match="There is no prepared data folder"):
        climb(path)
    assert not (tmp_path / "curve").exists()


def test_there_is_nothing_to_fit_before_anything_is_measured(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"There are no measured points at .*points\.csv"):
        write_fit(load_config(CurveConfig, write_spec(tmp_path, "data")))
