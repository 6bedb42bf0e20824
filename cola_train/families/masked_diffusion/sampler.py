"""LLaDA's generation: [mask] tokens after the prompt, unmasked from the most confident on."""

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from cola_train.config.sampling import SamplerConfig
from cola_train.families.transformer.flops import transformer_pass
from cola_train.flops.passes import Span, named, times
from cola_train.flops.work import NO_BACKWARD, Extent, Parts
from cola_train.models.attention.masks import document_positions
from cola_train.models.attention.rows import RowAttention
from cola_train.models.config import TransformerConfig
from cola_train.models.transformer import Transformer
from cola_train.randomness import Purpose, round_up_to_draws, uniform
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
        draws = _draws(config, index, new, step - 1)
        found = choose_tokens(logits, config, draws)
        confidence = logits.softmax(-1).gather(-1, found[..., None]).squeeze(-1)
        masked = block == mask
        confidence = torch.where(masked, confidence, torch.inf)  # what is committed stays
        stay = confidence.argsort(dim=1, descending=True, stable=True)[:, : new * step // num_steps]
        block = torch.where(masked, found, block)
        block = torch.full_like(block, mask).scatter(1, stay, block.gather(1, stay))
        tokens = torch.cat([tokens[:, :width], block], dim=1)
    return block


def _draws(config: SamplerConfig, index: Tensor, count: int, step: int) -> Tensor | None:
    if config.temperature == 0:
        return None
    start = step * round_up_to_draws(count)
    return uniform(config.seed, Purpose.SAMPLER_TOKEN, index, count, start)


def generation_work(
    config: TransformerConfig, sampler: SamplerConfig, prompt: int, batch: int
) -> Parts:
    """FLOPs: every step runs on the whole row, and the head on what is generated."""
    new = sampler.max_new_tokens
    # an empty prompt begins with the token that a document begins with
    length = max(1, prompt) + new
    span = Span(
        positions=Extent.of(length) * batch,
        pairs=Extent.of(length**2) * batch,
        outputs=Extent(new, length) * batch,
        output_pairs=Extent(new * length, length**2) * batch,
    )
    step = transformer_pass(config, span, Extent.of(new) * batch, NO_BACKWARD)
    return named("transformer", times(step, min(sampler.num_steps, new)))
