"""A judge that is a model: the generative perplexity of texts, per byte.

A checkpoint that was trained once on text of its own finds the likelihood of what others write.
Its own tokenizer cuts the text, so texts of models with different tokenizers stand on one scale.
"""

import dataclasses
import itertools
from pathlib import Path

import torch
from torch import Tensor

from cola_train.config.evaluation import LikelihoodConfig
from cola_train.config.settings import UserError, require
from cola_train.data.prepared import PreparedData
from cola_train.data.tokenizer import Tokenizer
from cola_train.evaluation.writing.statistics import Statistic, Texts, ratio
from cola_train.evaluation.writing.translation import Translation
from cola_train.families.checkpoint import Checkpoint
from cola_train.families.registry import load_checkpoint
from cola_train.likelihood.rows import ScoredRow, batches
from cola_train.run_folder import read_run_config
from cola_train.run_layout import run_of


@dataclasses.dataclass(frozen=True)
class ModelJudge:
    """A checkpoint whose likelihood is exact."""

    checkpoint: Checkpoint

    @classmethod
    def load(cls, folder: Path) -> "ModelJudge":
        """Read a checkpoint, or a run's export.

        Raises:
            UserError: there is none, or its likelihood is a bound, which judges nothing.
        """
        checkpoint = load_checkpoint(folder)
        require(
            checkpoint.likelihood_kind == "exact",
            f"A judge needs an exact likelihood, and that of {folder}, of `cola-train "
            f"{checkpoint.family}`, is a bound: it would judge by how loose it is, too. Train an "
            "autoregressive one (`cola-train ar`).",
        )
        return cls(checkpoint)

    @property
    def weights_xxh3(self) -> str:
        """The hash of its weights, by which results tell judges apart."""
        return str(self.checkpoint.identity()["checkpoint"]["weights_xxh3"])

    def nats_per_byte(self, prompts: Texts, texts: Texts, tokenizer: Tokenizer) -> Statistic:
        """-log P of each text after its prompt, both ids of `tokenizer`, per byte of the text.

        P is of the judge's own ids of either. A separator is a byte.

        Raises:
            UserError: a text is longer than the rows that the judge was trained on.
        """
        rows, places, lengths = [], [], []
        for place, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
            found = Translation.of(text, tokenizer, self.checkpoint.tokenizer, after=prompt)
            lengths.append(found.num_bytes)
            if found.ids:
                given = Translation.of(prompt, tokenizer, self.checkpoint.tokenizer)
                rows.append(self._row(given.ids, found.ids))
                places.append(place)
        nats = [0.0] * len(lengths)
        for place, log_p in zip(places, self._log_p(rows), strict=True):
            nats[place] = -log_p
        return ratio(nats, lengths)

    def _row(self, given: list[int], ids: list[int]) -> ScoredRow:
        """The text after as much of its opening as a row of training has room for."""
        limit = self.checkpoint.trained_seq_len
        if limit is not None:
            require(
                len(ids) < limit,
                f"A continuation has {len(ids)} tokens of the judge's tokenizer, and the judge was "
                f"trained on rows of {limit}: lower num_new_tokens, or give one of longer rows.",
            )
            given = given[max(0, len(given) + len(ids) - limit) :]
        tokens, documents = [*given, *ids], None
        if self.checkpoint.masks_documents:
            ends = [token == self.checkpoint.tokenizer.eos_token_id for token in tokens]
            documents = [*itertools.accumulate(ends[:-1], initial=0)]
        return ScoredRow(tokens, key=0, documents=documents, given=len(given))

    @torch.no_grad()
    def _log_p(self, rows: list[ScoredRow]) -> list[float]:
        config = LikelihoodConfig()
        estimator = self.checkpoint.likelihood(rows, config)
        widths = [estimator.width(place) for place in range(len(rows))]
        found = [0.0] * len(rows)
        for batch in batches(widths, 1, config.batch_size):
            log_p = estimator(batch)
            assert isinstance(log_p, Tensor)  # it is exact
            for draw, value in zip(batch, log_p.tolist(), strict=True):
                found[draw.row] = value
        return found


def require_disjoint(judge: Path, judged: Path) -> bool:
    """Refuse a judge that was trained on files that the judged model was; whether that is known.

    It would know by heart what the model repeats, and the real continuations too. Two preparations
    of one file count as the same text, whatever they hold out.

    Raises:
        UserError: both runs' data were prepared from one file or dataset; it is named.
    """
    judges, others = _sources(judge), _sources(judged)
    if judges is None or others is None:
        return False
    shared = [name for sha256, name in judges.items() if sha256 in others]
    require(
        not shared,
        f"The judge {judge} was trained on text that {judged} was trained on: both read "
        f"{', '.join(shared[:3])}{' and more' if len(shared) > 3 else ''}. Train one on other "
        'files (docs/scaling.md, "A judge of your own").',
    )
    return True


def _sources(folder: Path) -> dict[str, str] | None:
    """Hash and name of what a run's rows were made from; None where that is not known here."""
    run = run_of(folder)
    if run is None:
        return None
    try:
        data = PreparedData.open(read_run_config(run).data.path)
    except UserError:  # moved, or named from another folder
        return None
    return {source.sha256: source.name for source in data.manifest.sources}
