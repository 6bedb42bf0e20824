"""What a pass of the baselines' transformer costs."""

from cola_train.flops.passes import Block, Span, stack
from cola_train.flops.work import Backward, Extent, Linear, Parts, product
from cola_train.models.config import TransformerConfig


def transformer_pass(
    config: TransformerConfig, span: Span, logits: Extent, backward: Backward
) -> Parts:
    """A baseline's transformer; `logits` are the positions that the head runs on."""
    dim, hidden = config.hidden_size, config.intermediate_size
    block = Block(
        dim,
        config.num_attention_heads * config.head_dim,
        mlp=(Linear(dim, 2 * hidden), Linear(hidden, dim)),
        ends_with_product=True,
    )
    parts = stack(block, config.num_hidden_layers, span, backward)
    return parts | {"head": product(Linear(dim, config.vocab_size), logits, backward)}
