"""Models of other tokenizers: what they write is judged as the same text of our own would be."""

import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from cola_train.config.sampling import SamplerConfig
from cola_train.data.prepared import PreparedData
from cola_train.data.tokenizer import Tokenizer
from cola_train.evaluation.writing import writers
from cola_train.evaluation.writing.comparison import compare, held_out_openings
from cola_train.evaluation.writing.config import ComparisonConfig
from cola_train.families.checkpoint import Checkpoint
from tests.helpers.benchmarks import byte_tokenizer

CONFIG = ComparisonConfig(num_openings=20, num_new_tokens=12, num_bytes=16)


def of_tokenizer(tokenizer: Tokenizer) -> Checkpoint:
    return types.SimpleNamespace(tokenizer=tokenizer)  # type: ignore[return-value]


def test_the_same_text_in_other_ids_has_the_same_figures(
    prepared_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, other = PreparedData.open(prepared_folder), byte_tokenizer()
    prompts, endings = held_out_openings(data, 20, 12)
    eos = data.tokenizer.eos_token_id
    asked: list[int] = []

    def generate(
        checkpoint: Checkpoint,
        openings: Sequence[Sequence[int]],
        config: SamplerConfig,
        prompt_indices: Sequence[int],
    ) -> list[Any]:
        """Continues each opening as the held-out text does, a token a byte."""
        asked.append(config.max_new_tokens)
        results = []
        for opening, place in zip(openings, prompt_indices, strict=True):
            in_bytes = [other.eos_token_id if token == eos else token for token in opening]
            before = other.decode([token for token in in_bytes if token != other.eos_token_id])
            ours = data.tokenizer.decode([token for token in prompts[place] if token != eos])
            assert before.strip("\ufffd") == ours.strip("\ufffd")
            assert opening.count(other.eos_token_id) == prompts[place].count(eos)
            whole = other.encode_document(data.tokenizer.decode(endings[place]))
            # What follows a text that was cut is of no interest.
            ended = endings[place][-1] == eos
            whole += [] if ended else other.encode_document(" and so on" * 20)
            results.append(
                types.SimpleNamespace(
                    text=other.decode(whole[: config.max_new_tokens]),
                    finish_reason="stop" if ended else "length",
                )
            )
        return results

    monkeypatch.setattr(writers, "generate", generate)
    writer = writers.writer_of(of_tokenizer(other), data.tokenizer, CONFIG)
    found = compare(*writer, data, CONFIG).estimates
    assert found["next_word_accuracy"].value == 1
    for name in ("judge_nats_per_byte", "judge_nats_per_token", "known_word_share"):
        assert found[name] == found[f"held_out_{name}"]
    # 12 bytes are fewer than 12 tokens: it was asked again for more.
    assert asked[:2] == [12, 24]


def test_a_text_that_never_grows_is_asked_for_three_times_more(
    prepared_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = PreparedData.open(prepared_folder)
    asked = []

    def generate(checkpoint: Any, openings: Any, config: SamplerConfig, **at: Any) -> list[Any]:
        asked.append(config.max_new_tokens)
        return [types.SimpleNamespace(text="", finish_reason="length") for _ in openings]

    monkeypatch.setattr(writers, "generate", generate)
    greedy, _ = writers.writer_of(of_tokenizer(byte_tokenizer()), data.tokenizer, CONFIG)
    assert greedy([[5, 6], [7]], 3) == [[], []]
    assert asked == [3, 6, 12, 24]
