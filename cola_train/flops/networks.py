"""The work of one pass through each network, by part."""

import dataclasses

from cola_train.config.baselines import TransformerConfig
from cola_train.config.models import DiTConfig, TextVAEConfig
from cola_train.flops import shapes
from cola_train.flops.shapes import Block
from cola_train.flops.work import Backward, Extent, Work, attention, product
from cola_train.models.tiles import row_tiles

Parts = dict[str, Work]


@dataclasses.dataclass(frozen=True)
class Span:
    """What a pass runs on, summed over rows.

    Attributes:
        positions: those that the blocks run on.
        pairs: of query and key; useful are the visible ones.
        outputs: positions whose last hidden state someone reads. Of the others the last block needs keys and values alone.
        output_pairs: pairs whose query is one of these.
    """

    positions: Extent
    pairs: Extent
    outputs: Extent
    output_pairs: Extent

    @classmethod
    def all_read(cls, positions: int, pairs: Extent) -> "Span":
        """Where every position's output is read."""
        return cls(Extent.of(positions), pairs, Extent.of(positions), pairs)

    @classmethod
    def none_read(cls, positions: int, pairs: Extent) -> "Span":
        """Where keys and values are all that anyone reads: filling a cache."""
        return cls(Extent.of(positions), pairs, Extent(0, positions), Extent(0, pairs.executed))


def visible_pairs(length: int, block_size: int) -> int:
    """Pairs in a row of clean positions, each of which sees its own block and those before; `length` fills whole blocks."""
    blocks = length // block_size
    assert blocks * block_size == length
    return block_size**2 * blocks * (blocks + 1) // 2


def row_pairs(length: int, block_size: int, documents: bool = False) -> Extent:
    """Visible pairs of such a row, and those that kernels compute: whole tiles, or all pairs where one kernel goes without a mask.

    `documents`: whether they are kept apart, which takes a mask.
    """
    whole = block_size in (1, length) and not documents
    executed = length**2 if whole else sum(tile.pairs for tile in row_tiles(length, block_size))
    return Extent(visible_pairs(length, block_size), executed)


def encoder_pass(config: TextVAEConfig, span: Span, backward: Backward) -> Parts:
    """The VAE's encoder; positions are latents."""
    parts = _stack(shapes.vae_block(config), config.encoder_num_blocks, span, backward)
    parts["linear"] += product(shapes.vae_patch(config), span.positions, backward)
    parts["linear"] += product(shapes.vae_posterior(config), span.outputs, backward)
    return parts


def decoder_pass(config: TextVAEConfig, span: Span, logits: Extent, backward: Backward) -> Parts:
    """The VAE's decoder; positions are latents, `logits` the tokens that the head runs on."""
    parts = _stack(shapes.vae_block(config), config.decoder_num_blocks, span, backward)
    parts["linear"] += product(shapes.vae_latents_in(config), span.positions, backward)
    parts["linear"] += product(shapes.vae_unpatch(config), span.outputs, backward)
    return parts | {"head": product(shapes.vae_head(config), logits, backward)}


def dit_pass(config: DiTConfig, span: Span, times: Extent, backward: Backward, input_gradient: bool) -> Parts:
    """The DiT; adaLN and the time embedding run once per distinct time, `times` in all.

    `input_gradient`: whether the latents that it reads need a gradient.
    """
    parts = _stack(shapes.dit_block(config), config.num_layers, span, backward)
    parts["linear"] += product(shapes.dit_latents_in(config), span.positions, backward, input_gradient)
    parts["linear"] += product(shapes.dit_velocity(config), span.outputs, backward)
    modulation = product(shapes.dit_modulation(config), times, backward)
    adaln = (modulation.computed_again() if backward.recomputes_blocks else modulation) * config.num_layers
    adaln += product(shapes.dit_time_in(config), times, backward, input_gradient=False)
    for layer in shapes.dit_time(config):
        adaln += product(layer, times, backward)
    return parts | {"adaln": adaln}


def transformer_pass(config: TransformerConfig, span: Span, logits: Extent, backward: Backward) -> Parts:
    """A baseline's transformer; `logits` are the positions that the head runs on."""
    parts = _stack(shapes.transformer_block(config), config.num_hidden_layers, span, backward)
    return parts | {"head": product(shapes.transformer_head(config), logits, backward)}


def named(network: str, parts: Parts) -> Parts:
    """Parts with the network's name before theirs."""
    return {f"{network}.{name}": work for name, work in parts.items()}


def added(*several: Parts) -> Parts:
    """Parts of several passes, those of the same name added up."""
    total: Parts = {}
    for parts in several:
        for name, work in parts.items():
            total[name] = total.get(name, Work()) + work
    return total


def times(parts: Parts, count: int) -> Parts:
    """The same pass `count` times."""
    return {name: work * count for name, work in parts.items()}


def _stack(block: Block, count: int, span: Span, backward: Backward) -> Parts:
    """`count` blocks; the last one's share is smaller where not all outputs are read."""
    inner = _block(block, span.positions, span.positions, span.pairs, backward)
    last = _block(block, span.positions, span.outputs, span.output_pairs, backward)
    return added(times(inner, count - 1), last)


def _block(block: Block, positions: Extent, outputs: Extent, pairs: Extent, backward: Backward) -> Parts:
    linear = product(block.keys_values, positions, backward)
    for layer in (block.query, block.out, *block.mlp[:-1]):
        linear += product(layer, outputs, backward)
    end = product(block.mlp[-1], outputs, backward)
    attended = attention(pairs, block.query.outputs, backward)
    if backward.recomputes_blocks:
        linear, attended = linear.computed_again(), attended.computed_again()
        end = end if block.ends_with_product else end.computed_again()
    return {"linear": linear + end, "attention": attended}
