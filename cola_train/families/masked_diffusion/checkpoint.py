"""The masked diffusion model in memory, and what it can be asked."""

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float64, Int
from torch import Tensor

from cola_train.config.evaluation import LikelihoodConfig
from cola_train.config.sampling import SamplerConfig
from cola_train.data.tokenizer import Tokenizer
from cola_train.families.transformer.checkpoint import Kind, TransformerCheckpoint
from cola_train.families.transformer.family import transformer_pass
from cola_train.flops.passes import Span, named, times
from cola_train.flops.work import NO_BACKWARD, Extent, Parts
from cola_train.likelihood.rows import Draw, ScoredRow, draws_at
from cola_train.models.attention.masks import document_positions
from cola_train.models.attention.rows import RowAttention
from cola_train.models.transformer import Transformer
from cola_train.models.vocabulary_head import row_nats
from cola_train.randomness import Purpose, round_up_to_draws, uniform
from cola_train.sampling.stream import Noise, Text
from cola_train.sampling.token_choice import choose_tokens


def generate_masked(
    transformer: Transformer,
    prompts: Sequence[Sequence[int]],
    prompt_indices: Sequence[int],
    config: SamplerConfig,
) -> Int[Tensor, "batch new"]:
    """max_new_tokens after each prompt, in one block (LLaDA, algorithm 5: confidence remasking).

    At every step each masked position predicts its token, and those predictions stay whose
    probability is largest; the others are masked again. Step k of n leaves floor(new k / n) tokens,
    so no step is idle; n is config.num_steps, or `new` if that is less. Prompts, none empty, may
    differ in length; `prompt_indices` address the draws. Guidance does not apply; nor does the
    repetition penalty, which is on earlier blocks.
    """
    device, mask = transformer.lm_head.weight.device, transformer.mask_token_id
    new, width = config.max_new_tokens, max(len(prompt) for prompt in prompts)
    num_steps = min(config.num_steps, new)
    # Prompts end where the block begins; what fills short ones before is a document of its own,
    # which nothing else sees.
    rows = [[*[mask] * (width - len(prompt)), *prompt, *[mask] * new] for prompt in prompts]
    tokens = torch.tensor(rows, device=device)
    starts = torch.tensor([width - len(prompt) for prompt in prompts], device=device)
    document = (torch.arange(width + new, device=device)[None] >= starts[:, None]).long()
    attention = RowAttention(None)
    if bool(starts.any()):
        attention = RowAttention((document[:, :, None] == document[:, None, :])[:, None])
    positions = document_positions(document)
    index = torch.tensor(list(prompt_indices), device=device)
    block = tokens[:, width:]
    for step in range(1, num_steps + 1):
        hidden = transformer(tokens, positions=positions, attention=attention)[:, width:]
        logits = transformer.head(hidden).float()
        draws = None
        if config.temperature > 0:
            start = (step - 1) * round_up_to_draws(new)
            draws = uniform(config.seed, Purpose.SAMPLER_TOKEN, index, new, start)
        found = choose_tokens(logits, config, draws)
        confidence = logits.softmax(-1).gather(-1, found[..., None]).squeeze(-1)
        masked = block == mask
        confidence = torch.where(masked, confidence, torch.inf)  # what is committed stays
        stay = confidence.argsort(dim=1, descending=True, stable=True)[:, : new * step // num_steps]
        block = torch.where(masked, found, block)
        block = torch.full_like(block, mask).scatter(1, stay, block.gather(1, stay))
        tokens = torch.cat([tokens[:, :width], block], dim=1)
    return block


class MaskedDiffusionBound:
    """A lower bound of log p(x) under LLaDA, from draws of which tokens are masked.

    The bound is -E[(1/t) sum over masked tokens of -log p(x_i | x_t)] over t uniform in (0, 1] and
    masks of probability t, the training loss (`MaskedDiffusionObjective`) without its
    min_mask_prob. Here t is integrated out: given that l of the row's L tokens are masked, the mean
    weight is L / l with l uniform in 1..L, and the masked tokens are any l of them (LLaDA, equation
    6). That has the same mean and less variance. Tokens that are given are never masked. `rows` are
    not empty.
    """

    def __init__(
        self,
        transformer: Transformer,
        tokenizer: Tokenizer,
        rows: Sequence[ScoredRow],
        config: LikelihoodConfig,
    ) -> None:
        self.transformer, self.config, self.rows = transformer, config, rows
        self.pad_token_id = tokenizer.pad_token_id
        self.num_draws = config.num_samples

    def width(self, row: int) -> int:
        return len(self.rows[row].tokens)

    def __call__(self, draws: Sequence[Draw]) -> Float64[Tensor, " draws"]:
        """The bound's estimate from each draw, of rows of one width, nats."""
        transformer, seed = self.transformer, self.config.seed
        device = transformer.lm_head.weight.device
        rows = [self.rows[draw.row] for draw in draws]
        tokens = torch.tensor([list(row.tokens) for row in rows], device=device)
        width = tokens.shape[1]
        place = torch.arange(width, device=device)
        given = torch.tensor([row.given for row in rows], device=device)
        scored = (tokens != self.pad_token_id) & (place >= given[:, None])
        length = scored.sum(1)
        share = draws_at(uniform, seed, Purpose.DIFFUSION_TIME, self.rows, draws, 1, device)[:, 0]
        num_masked = 1 + (share * length).long().clamp(max=length - 1)
        order = draws_at(uniform, seed, Purpose.DIFFUSION_MASK, self.rows, draws, width, device)
        rank = (order + (~scored).float()).argsort(dim=1, stable=True).argsort(dim=1)
        masked = rank < num_masked[:, None]
        document = None
        if any(row.documents is not None for row in rows):
            document = torch.tensor(
                [list(row.documents or [0] * len(row.tokens)) for row in rows], device=device
            )
        hidden = transformer(torch.where(masked, transformer.mask_token_id, tokens), document)
        nats = (row_nats(transformer.head, hidden, tokens) * masked).sum(1)
        return -nats * length / num_masked


@dataclasses.dataclass
class MaskedDiffusionCheckpoint(TransformerCheckpoint):
    """A transformer that sees the whole row."""

    family = "llada"
    kind = Kind("cola_llada", "ColaLLaDAModel", causal=False)
    likelihood_kind = "bound"
    solver_settings = frozenset({"num_steps"})

    def texts(
        self,
        prompts: Sequence[Sequence[int]],
        addresses: Sequence[int],
        config: SamplerConfig,
        stops: frozenset[int],
        noise: Noise | None = None,
    ) -> Iterator[Text]:
        self.refuse_others_settings(config)
        # Rows of a batch end together, so none makes room for another.
        transformer = self.for_passes(self.transformer, config)
        # After nothing, all positions would look the same and none be the most confident one.
        ids = [list(prompt) or [self.tokenizer.eos_token_id] for prompt in prompts]
        for start in range(0, len(ids), config.batch_size):
            places = range(start, min(start + config.batch_size, len(ids)))
            some, indices = [ids[place] for place in places], [addresses[place] for place in places]
            batch = generate_masked(transformer, some, indices, config)
            yield from map(Text, places, batch.tolist())

    def tokens_a_pass(self, prompt_tokens: int, new_tokens: int) -> tuple[int, int]:
        return new_tokens, new_tokens

    def generation_work(self, config: SamplerConfig, prompt_tokens: int, batch: int) -> Parts:
        """FLOPs: every step runs on the whole row, and the head on what is generated."""
        network = self.transformer.config
        new = config.max_new_tokens
        # an empty prompt_tokens begins with the token that a document begins with
        length = max(1, prompt_tokens) + new
        span = Span(
            positions=Extent.of(length) * batch,
            pairs=Extent.of(length**2) * batch,
            outputs=Extent(new, length) * batch,
            output_pairs=Extent(new * length, length**2) * batch,
        )
        step = transformer_pass(network, span, Extent.of(new) * batch, NO_BACKWARD)
        return named("transformer", times(step, min(config.num_steps, new)))

    def describe_likelihood(self, config: LikelihoodConfig) -> str:
        return f"an upper bound, by {config.num_samples} draws of the mask for each row"

    def likelihood(
        self, rows: Sequence[ScoredRow], config: LikelihoodConfig
    ) -> MaskedDiffusionBound:
        return MaskedDiffusionBound(self.transformer, self.tokenizer, rows, config)
