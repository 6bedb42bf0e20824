"""The random draws of flow matching beside its noise: times, prompt blocks and hidden histories."""

import dataclasses
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cola_train.families.cola.config import FlowConfig
from cola_train.flow import logit_normal_time
from cola_train.models.dit import Times
from cola_train.randomness import Purpose, normal, round_up_to_draws, uniform


@dataclasses.dataclass(frozen=True)
class FlowDraws:
    """Draws for a batch, those of one noised copy of a row after another."""

    t: Float[Tensor, "batch blocks"]  # in [0, 1]
    pinned: Bool[Tensor, "batch noised"]  # prompt positions: clean, t = 0, no loss
    sees_history: Bool[Tensor, "batch noised"] | None  # None where nothing is ever hidden


def draw_copies(
    draw: Callable[..., Tensor],
    seed: int,
    purpose: Purpose,
    sample_index: Int[Tensor, " batch"],
    count: int,
    copies: int,
) -> Float[Tensor, "batch draws"]:
    """`count` values of `draw` (`uniform` or `normal`) for each of `copies`, one after another.

    The first copy's are those of a run with one copy.
    """
    starts = [copy * round_up_to_draws(count) for copy in range(copies)]
    each = [draw(seed, purpose, sample_index, count, start) for start in starts]
    return torch.cat(each, dim=1)


def flow_draws(
    config: FlowConfig, sample_index: Tensor, num_blocks: int, block_size: int, seed: int
) -> FlowDraws:
    """Times, prompt blocks and hidden histories of each sample, for each of its noise_copies.

    A block is a prompt block with probability prompt_block_prob; its first k positions are then
    pinned, k uniform in 1..block_size - 1.
    """

    def draw(kind: Callable[..., Tensor], purpose: Purpose) -> Float[Tensor, "batch blocks"]:
        return draw_copies(kind, seed, purpose, sample_index, num_blocks, config.noise_copies)

    if config.time_distribution == "uniform":
        t = draw(uniform, Purpose.FLOW_TIME)
    else:
        z = draw(normal, Purpose.FLOW_TIME)
        t = logit_normal_time(z, config.time_loc, config.time_scale)
    if config.timestep_per == "sample":
        # The blocks of a copy share its first draw.
        t = t[:, ::num_blocks].repeat_interleave(num_blocks, dim=1)
    is_prompt = draw(uniform, Purpose.PROMPT_BLOCK) < config.prompt_block_prob
    num_pinned = 1 + (draw(uniform, Purpose.PROMPT_LENGTH) * (block_size - 1)).long()
    # With blocks of one latent there is no partial prompt.
    num_pinned = torch.where(is_prompt, num_pinned.clamp(max=block_size - 1), 0)
    place = torch.arange(block_size, device=sample_index.device)
    sees_history = None
    if config.history_dropout > 0:
        keeps = draw(uniform, Purpose.HISTORY_DROPOUT) >= config.history_dropout
        sees_history = keeps.repeat_interleave(block_size, dim=1)
    return FlowDraws(t, (place < num_pinned[..., None]).flatten(1), sees_history)


def position_times(draws: FlowDraws, block_size: int, config: FlowConfig) -> Times:
    """A batch's distinct times, t = 0 last, and which one each noised position has."""
    rows, blocks = draws.t.shape
    # The blocks of a copy share their time, or each has its own.
    sharing = blocks // config.noise_copies if config.timestep_per == "sample" else 1
    distinct = draws.t[:, ::sharing].flatten()
    index = torch.arange(len(distinct), device=draws.t.device).view(rows, -1)
    index = index.repeat_interleave(sharing * block_size, dim=1)
    index = torch.where(draws.pinned, len(distinct), index)
    return Times(torch.cat([distinct, distinct.new_zeros(1)]), index)
