"""Checkpoints of any family in lm-evaluation-harness (the package lm_eval), as its model "cola".

    python -m cola_train.evaluation.harness --model cola --model_args checkpoint=RUN --tasks ...

is the harness's own program, which then knows the model; in Python it is this module's import.
"""

import dataclasses
import itertools
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import xxhash
from tqdm import tqdm

from cola_train.config.evaluation import LikelihoodConfig
from cola_train.config.load import load_config
from cola_train.config.sampling import SamplerConfig
from cola_train.config.settings import Settings, UserError, require, section
from cola_train.devices import named_device
from cola_train.evaluation.likelihood.likelihood import log_likelihoods_stream
from cola_train.evaluation.likelihood.perplexity import warn_if_long
from cola_train.families.generate import generate, generate_stream
from cola_train.families.registry import load_checkpoint
from cola_train.json_text import parse_json
from cola_train.likelihood.rows import ScoredRow

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
except ImportError as error:
    raise UserError(
        f"lm-evaluation-harness is not installed ({error}): pip install 'cola-train[lm-eval]'"
    ) from error

# Of a task's generation_kwargs; all else of the sampler is the model's, by `sampler.NAME`.
_TOKEN_CHOICE = ("temperature", "top_k", "top_p", "repetition_penalty")


@dataclasses.dataclass(frozen=True)
class HarnessConfig(Settings):
    """How the harness's requests are answered; `--model_args` has them as key=value."""

    sampler: SamplerConfig = section(
        SamplerConfig, help="How text is generated, but for what a task's generation_kwargs say."
    )
    likelihood: LikelihoodConfig = section(LikelihoodConfig, help="How likelihoods are found.")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.likelihood.method == "bound",
            "The harness compares options of different length, and likelihood.method=ode also "
            "scores what fills up their last block: use likelihood.method=bound.",
        )


@register_model("cola")
class HarnessModel(TemplateLM):  # type: ignore[misc]
    """A checkpoint, as the harness asks it.

    An answer depends on the checkpoint, the settings and the request, on nothing else: draws have
    addresses made of a request's context, which the options of one question share.
    """

    def __init__(
        self,
        checkpoint: str,
        device: str = "auto",
        batch_size: int | str = "auto",
        max_batch_size: int | None = None,
        **settings: Any,
    ) -> None:
        """Load a checkpoint, or a run's export.

        `settings` are those of HarnessConfig by dotted keys, such as `sampler.guidance_scale`.
        `batch_size` is that of both its sections; "auto" leaves them, and `max_batch_size`, which
        would belong to it, plays no part.

        Raises:
            UserError: no such checkpoint, device or setting.
        """
        super().__init__()
        if str(batch_size) != "auto":
            batch = {f"{part}.batch_size": batch_size for part in ("sampler", "likelihood")}
            settings = {**batch, **settings}
        texts = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
        self.config = load_config(HarnessConfig, None, texts)
        # The harness's program says cuda:0 where nothing was chosen, GPU or not.
        at = named_device("auto" if device == "cuda:0" else device)
        self.checkpoint = load_checkpoint(checkpoint, at)
        self._device = self.checkpoint.device

    @property
    def eot_token_id(self) -> int:
        """The end-of-text token's id."""
        return self.checkpoint.tokenizer.eos_token_id

    @property
    def tokenizer_name(self) -> str:
        """What the harness's cache of requests tells tokenizers by."""
        return f"cola-{self.checkpoint.tokenizer.sha256}"

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Ids of a text; none are added."""
        return self.checkpoint.tokenizer.encode(string)

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes beside its results: the weights' hash, and what log p is."""
        kind = self.checkpoint.likelihood_kind
        return {**self.checkpoint.identity(), "likelihood_kind": kind}

    @staticmethod
    def address(context: str, number: int = 0) -> int:
        """Of the random draws of a context's part or repetition `number`, in [0, 2^63)."""
        return xxhash.xxh3_64_intdigest(json.dumps([context, number]).encode()) >> 1

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """log p(continuation | context), and whether greedy decoding writes it.

        Exact of an autoregressive model; else by bounds, as `conditional_scores` says.
        """
        asked, rows = [], []
        for (context, _), given, ids in requests:
            # From nothing every family begins as it was trained to, without the harness's prefix.
            before = [] if context == "" else given
            asked.append((context, before, ids))
            rows.append(ScoredRow([*before, *ids], self.address(context), given=len(before)))
        log_p = self._log_p(rows, disable_tqdm)
        return [*zip(log_p, self._is_greedy(asked), strict=True)]

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """log p of whole texts: of rows of training's length, each after the token before it.

        So where the likelihood is a bound, that of a text of one row is a bound, and that of a
        longer one has differences of bounds in it.
        """
        rows, owners = [], []
        for number, request in enumerate(requests):
            (text,) = request.args
            tokens = self.tok_encode(text)
            limit = self.checkpoint.trained_seq_len or max(2, len(tokens))
            # A part and the token before it fill a row.
            starts = [0, *range(limit, len(tokens), max(1, limit - 1))] if tokens else []
            for place, (start, end) in enumerate(zip(starts, [*starts[1:], len(tokens)])):
                before = tokens[max(0, start - 1) : start]
                key = self.address(text, place)
                rows.append(ScoredRow([*before, *tokens[start:end]], key, given=len(before)))
                owners.append(number)
        sums = [0.0] * len(requests)
        for owner, log_p in zip(owners, self._log_p(rows, disable_tqdm), strict=True):
            sums[owner] += log_p
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts up to the first of a task's stops; greedy unless its generation_kwargs sample."""
        texts = [""] * len(requests)
        met: Counter[str] = Counter()
        groups: dict[str, list[tuple[int, str, int]]] = {}
        for number, request in enumerate(requests):
            context, asked = request.args
            # A request that is repeated has draws of its own each time.
            place = (number, context, self.address(context, met[context]))
            groups.setdefault(json.dumps(asked, sort_keys=True), []).append(place)
            met[context] += 1
        with tqdm(total=len(requests), desc="generating", disable=disable_tqdm or None) as bar:
            for asked, places in groups.items():
                sampler, stops = self._sampler(parse_json(asked))
                prompts = [context for _, context, _ in places]
                addresses = [address for _, _, address in places]
                stream = generate_stream(
                    self.checkpoint, prompts, sampler, prompt_indices=addresses
                )
                for (number, _, _), result in zip(places, stream, strict=True):
                    ends = [result.text.find(stop) for stop in stops]
                    texts[number] = result.text[: min((e for e in ends if e >= 0), default=None)]
                    bar.update()
        return texts

    def _sampler(self, asked: Mapping[str, Any]) -> tuple[SamplerConfig, list[str]]:
        """The sampler's settings for a task's generation_kwargs, and what ends its texts."""
        found = normalize_gen_kwargs(dict(asked), self.config.sampler.max_new_tokens)
        stops, num_new = found.pop("until"), found.pop("max_gen_toks")
        is_greedy = not found.pop("do_sample")
        unknown = sorted(found.keys() - {*_TOKEN_CHOICE})
        require(
            not unknown,
            f"The task's generation_kwargs have {', '.join(unknown)}, and there is no such setting "
            f"here; there are until, max_gen_toks, do_sample, {', '.join(_TOKEN_CHOICE)}.",
        )
        found["temperature"] = 0.0 if is_greedy else float(found.get("temperature", 1.0))
        sampler = dataclasses.replace(self.config.sampler, max_new_tokens=num_new, **found)
        return sampler, [stop for stop in stops if stop]

    def _log_p(self, rows: Sequence[ScoredRow], disable_tqdm: bool) -> list[float]:
        warn_if_long(rows, self.checkpoint.trained_seq_len)
        stream = log_likelihoods_stream(self.checkpoint, rows, self.config.likelihood)
        log_p = [0.0] * len(rows)
        for number, found in tqdm(stream, "likelihood", len(rows), disable=disable_tqdm or None):
            require(
                math.isfinite(found.log_p),
                f"log p of request {number} is not finite ({found.log_p}): the checkpoint may have "
                "diverged; look at it with `cola-train inspect`.",
            )
            log_p[number] = found.log_p
        return log_p

    def _is_greedy(self, asked: Sequence[tuple[str, list[int], list[int]]]) -> list[bool]:
        """Whether the likeliest tokens after each context, unguided, are its continuation.

        `asked` holds contexts, their ids and the continuations' ids.
        """
        own = dataclasses.replace(
            self.config.sampler, temperature=0.0, repetition_penalty=1.0, guidance_scale=1.0
        )
        written: dict[tuple[str, int], list[int]] = {}
        # How many tokens there will be may change which: of masked diffusion's canvas.
        for length, some in itertools.groupby(sorted(asked, key=_length), _length):
            prompts = {context: given for context, given, _ in some}
            results = generate(
                self.checkpoint,
                [*prompts.values()],
                dataclasses.replace(own, max_new_tokens=length),
                prompt_indices=[*map(self.address, prompts)],
                warn_if_long=False,
            )
            for context, result in zip(prompts, results, strict=True):
                written[context, length] = result.decoded_ids
        return [written[context, len(ids)] == ids for context, _, ids in asked]


def _length(asked: tuple[str, list[int], list[int]]) -> int:
    return len(asked[2])


if __name__ == "__main__":
    cli_evaluate()
