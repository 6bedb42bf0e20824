"""From a spec to runs: every point ends at the first step that reaches its budget, on the same
data, each after what it needs.
"""

import json
import shlex
from pathlib import Path

import pytest

from cola_train.config.load import load_config
from cola_train.config.settings import UserError
from cola_train.families.costs import flops_after
from cola_train.scaling.children import levels
from cola_train.scaling.config import CurveConfig
from cola_train.scaling.curve import write_launch_lines
from cola_train.scaling.ladder import PlannedRun, ladder
from cola_train.training.optim.schedule import Schedule
from tests.helpers.runs import SMALL, SMALL_DIT

TRANSFORMER = [
    "transformer.vocab_size=320",
    "transformer.hidden_size=16",
    "transformer.intermediate_size=32",
    "transformer.num_attention_heads=2",
    "transformer.head_dim=8",
    "transformer.num_hidden_layers=1",
]


def write_config(path: Path, stage: str, settings: list[str], **more: object) -> None:
    nested: dict[str, object] = {"stage": stage, "name": "x", **more}
    for setting in settings:
        key, value = setting.split("=")
        inner = nested
        *sections, leaf = key.split(".")
        for section in sections:
            inner = inner.setdefault(section, {})  # type: ignore[assignment]
        inner[leaf] = json.loads(value) if value[0].isdigit() else value
    path.write_text(json.dumps(nested), encoding="utf-8")  # JSON is YAML


def write_spec(folder: Path, data: Path | str, **changes: object) -> Path:
    shared = [
        setting
        for setting in SMALL
        if not setting.startswith(("vae.", "optim.decay", "trainer.max_steps"))
    ]
    vae = [setting for setting in SMALL if setting.startswith("vae.")]
    write_config(
        folder / "vae.yaml", "vae", [*shared, *vae, "trainer.max_steps=4", "optim.decay=9"]
    )
    frozen = {
        "objective": {"reference_weight": 0, "mask_weight": 0, "vae_strategy": {"mode": "fix"}},
        "init_vae_from": "set later",
    }
    write_config(folder / "joint.yaml", "joint", [*shared, *vae, *SMALL_DIT], **frozen)
    for stage in ("ar", "llada"):
        write_config(folder / f"{stage}.yaml", stage, [*shared, *TRANSFORMER])
    sizes = {"one": ["transformer.num_hidden_layers=1"], "two": ["transformer.num_hidden_layers=2"]}
    spec = {
        "folder": str(folder / "curve"),
        "budgets": [3e-10, 6e-10],
        "settings": [
            f"data.path={data}",
            "trainer.validate_every_steps=0",
            "checkpoint.every_steps=1000",
        ],
        "families": {
            "cola": {
                "config": "joint.yaml",
                "stage1": "vae.yaml",
                "sizes": {"one": ["dit.num_layers=1"]},
            },
            "ar": {"config": "ar.yaml", "sizes": sizes},
        },
        "comparison": {"num_openings": 8, "num_new_tokens": 8},
        **changes,
    }
    (folder / "spec.yaml").write_text(json.dumps(spec), encoding="utf-8")
    return folder / "spec.yaml"


def read(path: Path) -> tuple[CurveConfig, list[PlannedRun]]:
    spec = load_config(CurveConfig, path)
    return spec, ladder(spec, path.parent)


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_a_point_ends_at_the_first_step_that_reaches_its_budget(
    tmp_path: Path, schedule: str
) -> None:
    _, planned_runs = read(write_spec(tmp_path, "data", schedule=schedule))
    points = [planned for planned in planned_runs if planned.is_point]
    assert len(points) == 6
    stage1 = flops_after(planned_runs[0].config, 4)["model"]
    for planned in points:
        before, steps = (
            (stage1 if planned.family == "cola" else 0),
            planned.config.trainer.max_steps,
        )
        budget = round(planned.budget * 1e18)
        assert (
            before + flops_after(planned.config, steps - 1)["model"]
            < budget
            <= before + flops_after(planned.config, steps)["model"]
        )
        assert Schedule.of(planned.config).rate(steps) == planned.config.optim.final_learning_rate


def test_anneals_branch_off_at_the_marks_of_a_constant_rate_run(tmp_path: Path) -> None:
    _, planned_runs = read(write_spec(tmp_path, "data"))
    assert [
        (planned.name, planned.kind, planned.after)
        for planned in planned_runs
        if planned.family == "cola"
    ] == [
        ("cola-stage1", "stage1", ()),
        ("cola-one-trunk", "trunk", ("cola-stage1",)),
        ("cola-one-3e-10", "anneal", ("cola-one-trunk",)),
        ("cola-one-6e-10", "anneal", ("cola-one-trunk",)),
    ]
    for trunk in (planned for planned in planned_runs if planned.kind == "trunk"):
        constant = Schedule.of(trunk.config)
        anneals = [planned for planned in planned_runs if planned.after == (trunk.name,)]
        begins = [
            int(planned.arguments[planned.arguments.index("--step") + 1]) for planned in anneals
        ]
        assert trunk.config.budget.marks == [f"{begin} steps" for begin in begins]
        assert trunk.config.trainer.max_steps == begins[-1]
        for planned, begin in zip(anneals, begins, strict=True):
            own, steps = Schedule.of(planned.config), planned.config.trainer.max_steps
            assert all(own.rate(step) == constant.rate(step) for step in range(begin + 1))
            assert own.rate(begin + 1) < constant.rate(begin + 1)
            assert steps - begin == max(1, round(0.2 * steps))


def test_all_families_read_the_same_samples(tmp_path: Path) -> None:
    spec, planned_runs = read(write_spec(tmp_path, "data"))
    assert {
        (planned.config.data.path, planned.config.data_seed, planned.config.seed)
        for planned in planned_runs
    } == {("data", 6198, 66)}
    assert all(planned.config.runs_folder == spec.folder for planned in planned_runs)
    assert {
        planned.config.init_vae_from for planned in planned_runs if planned.config.stage == "joint"
    } == {f"{spec.folder}/cola-stage1"}  # type: ignore[attr-defined]


def test_a_config_needs_no_start_of_its_own_where_the_curve_gives_one(tmp_path: Path) -> None:
    path = write_spec(tmp_path, "data")
    joint = json.loads((tmp_path / "joint.yaml").read_text(encoding="utf-8"))
    del joint["init_vae_from"]  # which its mode cannot do without
    (tmp_path / "joint.yaml").write_text(json.dumps(joint), encoding="utf-8")
    spec, planned_runs = read(path)
    assert {
        planned.config.init_vae_from for planned in planned_runs if planned.config.stage == "joint"
    } == {f"{spec.folder}/cola-stage1"}  # type: ignore[attr-defined]


def test_launch_lines_are_a_level_a_file_and_each_is_a_run(tmp_path: Path) -> None:
    path = write_spec(tmp_path, "data")
    spec, planned_runs = read(path)
    written = write_launch_lines(spec, tmp_path, tmp_path / "lines", "bash launch.sh")
    # Stage 1 and the baselines' trunks; then their anneals and Cola's trunk; then its anneals.
    assert [len(file.read_text().splitlines()) for file in written] == [3, 5, 2]
    lines = [line for file in written for line in file.read_text().splitlines()]
    assert len(lines) == len(planned_runs)
    for level, file in zip(levels(planned_runs), written, strict=True):
        for planned, line in zip(level, file.read_text().splitlines(), strict=True):
            training, *comparison = line.split(" && ")
            assert shlex.split(training) == ["bash", "launch.sh", *planned.arguments]
            assert bool(comparison) == planned.is_point
            if comparison:
                assert shlex.split(comparison[0])[:3] == [
                    "cola-train",
                    "compare",
                    f"{spec.folder}/{planned.name}",
                ]
                assert "num_openings=8" in comparison[0]


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"budgets": [1e-11]},
            r"budget of 1e-11 EFLOPs is used up by stage 1 \(cola-stage1\), which costs 5.2",
        ),
        (
            {"budgets": [6e-11, 6.1e-11]},
            r"too small or too close for cola one: its anneals would begin at steps",
        ),
        ({"budgets": []}, "budgets must be different numbers of EFLOPs above 0"),
        ({"budgets": [1e-9, 1e-9]}, "budgets must be different"),
        ({"anneal_share": 1.5}, r"anneal_share must be in \(0, 1\), not 1.5"),
        ({"families": {}}, "A curve needs families"),
        (
            {"families": {"a/b": {"config": "ar.yaml", "sizes": {"x": []}}}},
            "become folders.*not 'a/b'",
        ),
        (
            {"families": {"ar": {"config": "ar.yaml", "sizes": {}}}},
            "A family needs at least one size",
        ),
        (
            {"families": {"ar": {"config": "none.yaml", "sizes": {"x": []}}}},
            "There is no config file",
        ),
        (
            {"families": {"ar": {"config": "ar.yaml", "sizes": {"x": [], "y": ["data_seed=3"]}}}},
            "data_seed is 6198 in .* and 3 in",
        ),
        (
            {"families": {"cola": {"config": "joint.yaml", "sizes": {"x": []}}}},
            "whose cost no budget counts; give its config as `stage1`",
        ),
        (
            {"families": {"ar": {"config": "ar.yaml", "stage1": "vae.yaml", "sizes": {"x": []}}}},
            r"ar\.yaml is of a family that starts from no first stage; leave `stage1` out",
        ),
        ({"budget": [1]}, "Unknown config key 'budget'"),
    ],
)
def test_a_spec_that_cannot_be_is_refused(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        read(write_spec(tmp_path, "data", **changes))
