"""What the baselines' transformer and their training steps cost, from the run's config alone."""

from cola_train.families.transformer.config import BaselineRunConfig
from cola_train.flops.passes import Block, Span, named, row_pairs, stack
from cola_train.flops.work import Backward, Extent, Linear, Parts, product
from cola_train.models.config import TransformerConfig


def step_work(config: BaselineRunConfig, causal: bool) -> Parts:
    """One optimizer step over all its rows."""
    recomputes = config.parallel.activation_checkpointing == "full"
    backward = Backward(runs=True, recomputes_blocks=recomputes)
    rows, seq = config.trainer.global_batch_size, config.data.seq_len
    pairs = row_pairs(seq, 1 if causal else seq, config.masks_documents)
    span = Span.all_read(rows * seq, pairs * rows)
    # The last token of a row predicts nothing.
    logits = Extent.of(rows * (seq - causal))
    return named("transformer", transformer_pass(config.transformer, span, logits, backward))


def transformer_pass(
    config: TransformerConfig, span: Span, logits: Extent, backward: Backward
) -> Parts:
    """A baseline's transformer; `logits` are the positions that the head runs on."""
    dim, hidden = config.hidden_size, config.intermediate_size
    inner = config.num_attention_heads * config.head_dim
    block = Block(
        query=Linear(dim, inner),
        keys_values=Linear(dim, 2 * inner),
        out=Linear(inner, dim),
        mlp=(Linear(dim, 2 * hidden), Linear(hidden, dim)),
        ends_with_product=True,
    )
    parts = stack(block, config.num_hidden_layers, span, backward)
    return parts | {"head": product(Linear(dim, config.vocab_size), logits, backward)}
