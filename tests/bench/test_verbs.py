"""The verb as a user meets it: JSON where it belongs, refusals before anything is measured,
searches, series.
"""

import contextlib
import io
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from cola_train.bench import growth, quality, worker
from cola_train.bench.config import BenchGrowthConfig, BenchTrainConfig, MemoryTooSmallError
from cola_train.bench.growth import run_growth
from cola_train.bench.worker import measure_in_a_process, run_train
from cola_train.cli import main
from cola_train.config.load import load_config
from cola_train.config.settings import UserError
from cola_train.families.checkpoint import SolverQuality
from cola_train.families.cola.checkpoint import ColaCheckpoint


def test_train_prints_json_of_a_run_file_and_nothing_else(
    tiny_run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = [f"workload={tiny_run}", "rows=2", "warmups=1", "runs=2", "optim.gradient_clip=0.5"]
    assert main(["bench", "train", *settings]) == 0
    out, err = capfd.readouterr()
    result = json.loads(out)
    assert (
        result["rows"],
        result["micro_batches"],
        result["tokens"],
        len(result["seconds"]["runs"]),
    ) == (2, 1, 64, 2)
    assert result["machine"]["threads"] == 1
    assert "measuring" in err
    # In a process of its own, where no memory lies about to be used again: gradients and AdamW's
    # two moments at least.
    memory = result["memory"]
    assert memory["growth_bytes"] == memory["peak_bytes"] - memory["before_bytes"]
    assert memory["growth_bytes"] > 3 * 4 * result["parameters"]["dit"]


def in_this_process(command: list[str], **options: Any) -> "subprocess.CompletedProcess[str]":
    """What a measuring process does with its arguments, without starting one."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(sys, "argv", command[2:])
        worker._main()
    return subprocess.CompletedProcess(command, 0, stdout=printed.getvalue())


def test_sample_writes_a_new_file(
    tiny_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(worker.subprocess, "run", in_this_process)
    out = tmp_path / "sample.json"
    settings = [
        f"workload={tiny_folder}",
        "batch=2",
        "sampler.max_new_tokens=8",
        "sampler.num_steps=1",
        "warmups=1",
        "runs=1",
    ]
    assert main(["bench", "sample", *settings, f"out={out}", "--device", "cpu"]) == 0
    result = json.loads(out.read_text(encoding="utf-8"))
    assert (result["batch"], result["new_tokens"], result["sampler"]["num_steps"]) == (2, 8, 1)
    assert capsys.readouterr().out == ""
    assert main(["bench", "sample", *settings, f"out={out}"]) == 2
    assert f"{out} exists and is not overwritten; choose another name." in capsys.readouterr().err
    assert main(["bench", "sample", "workload=nothing", "--device", "cpu"]) == 2
    assert "There is no workload 'nothing'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["train", "row=3"], "Unknown config key 'row'"),
        (["train", "runs=0"], "runs must be at least 1, not 0"),
        (["sample", "batch=0"], "batch must be at least 1, not 0"),
        (["growth", "workload=paper_stage1"], "give a workload of stage 2, not paper_stage1"),
        (
            ["growth", "widths=[48]"],
            "widths must be multiples of the workload's head width, 32, not 48",
        ),
        (
            ["quality", "nowhere", "prompts=x", "reference_steps=2"],
            "reference_steps (2) must be more than any of steps",
        ),
    ],
)
def test_what_is_wrong_is_said_at_once(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err


def a_step(seconds: float, rows: int, **more: Any) -> dict[str, Any]:
    """What a measuring process would report, as far as its callers read it."""
    return {
        "rows": rows,
        "seconds": {"median": seconds},
        "tokens_per_second": rows * 100 / seconds,
        "tokens_per_second_per_gflops": rows / seconds,
        "memory": {"peak_bytes": 10 * rows, "growth_bytes": 3 * rows},
        "machine": {"device": "none"},
        "backbone_parameters": 7,
        "flops": {"executed": 11},
        **more,
    }


@pytest.mark.parametrize(
    "most, slower_from, best, tried",
    [(8, 99, 8, [1, 2, 4, 8]), (99, 8, 4, [1, 2, 4, 8]), (1, 99, 1, [1])],
)
def test_rows_double_until_memory_or_gain_ends(
    most: int, slower_from: int, best: int, tried: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[BenchTrainConfig] = []

    def measure(kind: str, config: BenchTrainConfig, of_run: Sequence[str]) -> dict[str, Any]:
        asked.append(config)
        assert (kind, of_run) == ("train", ["trainer.precision=bf16"])
        assert config.rows is not None
        if config.rows > most:
            raise MemoryTooSmallError("too small")
        return a_step(
            1.0 + config.rows if config.rows < slower_from else 2.5 * config.rows, config.rows
        )

    monkeypatch.setattr(worker, "measure_in_a_process", measure)
    result = run_train(
        BenchTrainConfig(find_rows=True, runs=7, profile=True), ["trainer.precision=bf16"]
    )
    assert [one["rows"] for one in result["tried"]] == tried
    assert result["rows"] == best
    # Short looks first, then the one that counts.
    assert [(one.runs, one.profile) for one in asked[:-1]] == [(2, False)] * (len(asked) - 1)
    assert (asked[-1].rows, asked[-1].runs, asked[-1].profile, asked[-1].find_rows) == (
        best,
        7,
        True,
        False,
    )


def test_no_row_at_all_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(*arguments: Any) -> dict[str, Any]:
        raise MemoryTooSmallError("too small")

    monkeypatch.setattr(worker, "measure_in_a_process", measure)
    with pytest.raises(UserError, match="too small"):
        run_train(BenchTrainConfig(find_rows=True), [])


def test_growth_varies_one_size_at_a_time_and_finds_its_exponent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int, tuple[str, ...]]] = []

    def measure(kind: str, config: BenchTrainConfig, of_run: Sequence[str]) -> dict[str, Any]:
        assert config.rows is not None
        assert config.seq_len is not None
        asked.append((config.rows, config.seq_len, tuple(of_run)))
        layers = next((int(text.split("=")[1]) for text in of_run if "num_layers" in text), 4)
        return a_step(config.rows * config.seq_len**2 * layers**0.5, config.rows)

    monkeypatch.setattr(growth, "measure_in_a_process", measure)
    figure = tmp_path / "growth"
    settings = [
        "batches=[1,2,8]",
        "lengths=[64,256]",
        "block_sizes=[4]",
        "layers=[2,4]",
        "widths=[64,128]",
        f"figure={figure}",
    ]
    config = load_config(BenchGrowthConfig, None, settings)
    result = run_growth(config, ["trainer.precision=bf16"])
    exponents = result["exponents"]
    assert [exponents[name] for name in ("batch", "length", "layers", "width")] == pytest.approx(
        [1, 2, 0.5, 0]
    )
    assert exponents["block_size"] is None
    assert result["time_ratio"] == pytest.approx(8)
    assert [point["value"] for point in result["series"]["batch"]] == [1, 2, 8]
    assert result["series"]["length"][0]["growth_bytes"] == 12
    assert {
        (point["parameters"], point["flops"])
        for points in result["series"].values()
        for point in points
    } == {(7, 11)}
    bf16 = "trainer.precision=bf16"
    assert asked == [
        (1, 256, (bf16,)),
        (2, 256, (bf16,)),
        (8, 256, (bf16,)),
        (4, 64, (bf16,)),
        (4, 256, (bf16,)),
        (4, 256, (bf16, "dit.block_size=4")),
        (4, 256, (bf16, "dit.num_layers=2")),
        (4, 256, (bf16, "dit.txt_dim=64", "dit.emb_dim=64", "dit.heads=2")),
    ]
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")
    assert "rows of a step" in (tmp_path / "growth.svg").read_text(encoding="utf-8")
    with pytest.raises(UserError, match=r"growth\.png exists and is not overwritten"):
        run_growth(config, [])


def test_a_measuring_process_that_is_killed_or_fails_is_reported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def ended(status: int, output: str = "") -> None:
        done = subprocess.CompletedProcess([], status, stdout=output)
        monkeypatch.setattr(worker.subprocess, "run", lambda *arguments, **options: done)

    config = BenchTrainConfig()
    ended(-9)
    with pytest.raises(
        MemoryTooSmallError, match="killed by signal 9, as a system does whose memory has run out"
    ):
        measure_in_a_process("train", config)
    ended(-11)
    with pytest.raises(UserError, match="killed by signal 11"):
        measure_in_a_process("train", config)
    ended(1)
    with pytest.raises(RuntimeError, match="failed"):
        measure_in_a_process("train", config)
    ended(0, 'words\ncola_train measured: {"refused": "no such thing", "memory": false}\n')
    with pytest.raises(UserError, match="no such thing") as refused:
        measure_in_a_process("train", config)
    assert not isinstance(refused.value, MemoryTooSmallError)
    ended(0, 'cola_train measured: {"refused": "too large", "memory": true}\n')
    with pytest.raises(MemoryTooSmallError, match="too large"):
        measure_in_a_process("train", config)


@pytest.mark.parametrize("kind", ["train", "sample", "growth", "data", "quality"])
def test_every_kind_explains_its_settings(
    kind: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as end:
        main(["bench", kind, "--help"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert f"usage: cola-train bench {kind}" in out
    assert re.search(r"\n  out\s+A new JSON file for the result; null prints it. \[null\]", out)


def test_quality_reads_prompts_or_takes_passages_and_reports_rows(
    tiny_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[Any, ...]] = []

    def compare_solvers(checkpoint: ColaCheckpoint, *arguments: Any) -> list[SolverQuality]:
        asked.append(arguments)
        return [SolverQuality("euler", steps, steps, 0.5, 0.75, 1.0, 1.0) for steps in arguments[3]]

    monkeypatch.setattr(ColaCheckpoint, "compare_solvers", compare_solvers)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "w4 w6"}\n{"input_ids": [5, 6, 7]}\n', encoding="utf-8")
    settings = ["steps=[2,3]", "reference_steps=9", "solvers=[euler]", "sampler.guidance_scale=1"]
    assert (
        main(
            [
                "bench",
                "quality",
                str(tiny_folder),
                f"prompts={prompts}",
                *settings,
                "--device",
                "cpu",
            ]
        )
        == 0
    )
    result = json.loads(capsys.readouterr().out)
    assert [(row["solver"], row["num_steps"]) for row in result["rows"]] == [
        ("euler", 2),
        ("euler", 3),
    ]
    assert (result["prompts"], result["reference_steps"], result["sampler"]["guidance_scale"]) == (
        2,
        9,
        1.0,
    )
    given, sampler, *rest = asked[0]
    assert (given, sampler.guidance_scale, rest) == (
        [[4, 6], [5, 6, 7]],
        1.0,
        [["euler"], [2, 3], 9],
    )
    assert (
        main(
            [
                "bench",
                "quality",
                str(tiny_folder),
                "num_prompts=3",
                "prompt_tokens=5",
                "--device",
                "cpu",
            ]
        )
        == 0
    )
    passages = asked[1][0]
    assert [len(passage) for passage in passages] == [5, 5, 5]
    assert len(set(quality._passages(16))) == 16
