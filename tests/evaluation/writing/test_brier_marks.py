"""Over the checkpoints of a real run, BrierLM rises as the loss falls."""

from pathlib import Path

import pytest
from scipy.stats import spearmanr

from cola_train.config.data import CorpusConfig, PrepareConfig, TokenizerTrainConfig
from cola_train.config.load import load_config
from cola_train.data.prepare import prepare
from cola_train.data.tokenizer_training import train_tokenizer
from cola_train.evaluation.writing.compare import compare_run
from cola_train.evaluation.writing.config import ComparisonConfig
from cola_train.families.autoregressive.family import AutoregressiveRunConfig
from cola_train.run_layout import folder_of
from cola_train.training.run import train
from tests.helpers.runs import BOOK, figures

CONFIG = Path(__file__).resolve().parents[3] / "configs" / "small" / "ar_marks_austen.yaml"


@pytest.mark.nightly  # 3,200 steps, and 20,000 samples of each mark
@pytest.mark.timeout(7200)
def test_brier_lm_ranks_checkpoints_as_their_loss_does(tmp_path: Path) -> None:
    corpus, tokenizer = CorpusConfig(inputs=[str(BOOK)]), str(tmp_path / "tokenizer.json")
    train_tokenizer(TokenizerTrainConfig(out=tokenizer, corpus=corpus, vocab_size=1024))
    rows = str(tmp_path / "rows")
    prepare(
        PrepareConfig(out=rows, tokenizer=tokenizer, corpus=corpus, seq_len=64, held_out_share=0.03)
    )
    places = [f"data.path={rows}", f"runs_folder={tmp_path}", "trainer.accelerator=cpu"]
    config = load_config(AutoregressiveRunConfig, CONFIG, places)
    assert train(config).state == "finished"
    run, many = folder_of(config), ComparisonConfig(num_new_tokens=8, brier_places=40)
    marks = sorted((run / "marks").iterdir())
    for mark in marks:
        compare_run(mark, many)
    found = figures(run)
    steps = [int(mark.name.removeprefix("step-")) for mark in marks]
    assert len(steps) == 8
    losses, scores = (
        [found[step, name] for step in steps] for name in ("validation/loss", "comparison/brier_lm")
    )
    assert spearmanr(losses, scores).statistic <= -0.95
