"""`bench data`: its figures against one another and against what was asked; what it leaves; what it
refuses.
"""

import errno
import json
import os
import statistics
from pathlib import Path
from typing import Any

import pytest

from cola_train.bench import data
from cola_train.bench.config import BenchDataConfig, BenchTrainConfig
from cola_train.bench.data import run_data
from cola_train.config.settings import UserError
from cola_train.data.tokenizer import Tokenizer
from tests.helpers.tiny import tiny_tokenizer

PARAGRAPHS = [
    " ".join(f"w{4 + (number * place) % 25}" for place in range(1, 40)) for number in range(1, 60)
]


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A text of 59 paragraphs of 39 words, an id each; the places of its own that a measurement may
    use.
    """
    (tmp_path / "text.txt").write_text("\n\n".join(PARAGRAPHS), encoding="utf-8")
    tiny_tokenizer().save(tmp_path / "tokenizer.json")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(data, "_BATCHES_A_RUN", 3)
    return {
        "text": str(tmp_path / "text.txt"),
        "tokenizer": str(tmp_path / "tokenizer.json"),
        "least_characters": 1,
        "runs": 2,
    }


def test_its_figures_fit_together(
    files: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    found = json.loads(
        json.dumps(run_data(BenchDataConfig(**files, rows=4, seq_len=32, step_seconds=0.5)))
    )
    tokenizing = found["tokenizing"]
    assert (tokenizing["documents"], tokenizing["tokens"]) == (59, 59 * 39)
    rates = [spread["median"] for spread in tokenizing["library_tokens_per_second"].values()]
    assert len(rates) == 2
    assert tokenizing["ratio"] == pytest.approx(
        tokenizing["ours_tokens_per_second"]["median"] / max(rates)
    )
    for read in found["reading"].values():
        per_row = read["microseconds_per_row"]
        assert len(per_row["runs"]) == 2
        assert read["share_of_step"] == pytest.approx(
            statistics.median(per_row["runs"]) * 4 / 1e6 / 0.5
        )
    store = found["huge_store"]
    assert store["rows"] == 10**9
    assert store["open_seconds"]["max"] < store["first_batch_seconds"]["max"] < 1.0
    # Nothing is left on the disk or in the environment.
    assert list((tmp_path / "temporary").iterdir()) == []
    assert os.environ["TOKENIZERS_PARALLELISM"] == "true"


def test_a_short_text_is_repeated_in_other_orders(files: dict[str, Any]) -> None:
    files["least_characters"] = 2 * sum(map(len, PARAGRAPHS)) + 1
    found = run_data(BenchDataConfig(**files, rows=2, seq_len=32, step_seconds=1.0))
    assert found["tokenizing"]["tokens"] == 3 * 59 * 39


def test_the_step_to_compare_with_is_measured_with_the_same_batch(
    files: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def measure(kind: str, config: BenchTrainConfig, of_run: list[str]) -> dict[str, Any]:
        asked.append((kind, config.workload, config.rows, config.seq_len, of_run))
        return {"seconds": {"median": 0.25}}

    monkeypatch.setattr(data, "measure_in_a_process", measure)
    found = run_data(BenchDataConfig(**files, rows=3, seq_len=16))
    assert asked == [("train", "S", 3, 16, ["trainer.accelerator=cpu"])]
    assert found["step_seconds"] == 0.25


def test_without_a_tokenizer_one_is_learnt_from_the_text(
    files: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "_LEARNT_IDS", 300)
    loaded: list[Tokenizer] = []
    load = Tokenizer.load.__func__  # type: ignore[attr-defined]
    monkeypatch.setattr(
        Tokenizer,
        "load",
        classmethod(lambda cls, *given: loaded.append(load(cls, *given)) or loaded[-1]),
    )
    del files["tokenizer"]
    run_data(BenchDataConfig(**files, rows=2, seq_len=32, step_seconds=1.0))
    assert loaded
    assert {tokenizer.vocab_size for tokenizer in loaded} <= set(range(261, 301))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"runs": 0}, "runs must be at least 1, not 0"),
        ({"rows": 0}, "rows must be at least 1, not 0"),
        ({"step_seconds": 0.0}, "step_seconds must be above 0 or null, not 0.0"),
        (
            {"text": "nowhere.txt"},
            r"There is no text file nowhere\.txt; give a \.txt file, or null",
        ),
        (
            {"seq_len": 10**6},
            r"must fill at least one row of the training split: it has 2360 tokens",
        ),
    ],
)
def test_what_is_refused(files: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run_data(BenchDataConfig(**{**files, "step_seconds": 1.0, **changes}))


def test_a_text_without_words(files: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(
        UserError, match=r"empty\.txt has no text in it; give a \.txt file of prose"
    ):
        run_data(
            BenchDataConfig(**{**files, "text": str(tmp_path / "empty.txt"), "step_seconds": 1.0})
        )


def test_a_disk_without_sparse_files(
    files: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def truncate(path: Path, size: int) -> None:
        raise OSError(errno.EFBIG, "File too large")

    monkeypatch.setattr(os, "truncate", truncate)
    with pytest.raises(
        UserError,
        match=(
            r"sparse file of 2,048,000,000,000 bytes in .* \(File too large\); set TMPDIR to a "
            r"folder"
        ),
    ):
        run_data(BenchDataConfig(**files, rows=2, seq_len=32, step_seconds=1.0))
