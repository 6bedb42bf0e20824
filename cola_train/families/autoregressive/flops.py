"""What generating text token by token costs, from the network's config alone."""

from cola_train.config.sampling import SamplerConfig
from cola_train.families.transformer.flops import transformer_pass
from cola_train.flops.passes import Span, added, named, row_pairs
from cola_train.flops.work import NO_BACKWARD, Extent, Parts
from cola_train.models.config import TransformerConfig


def generation_work(
    config: TransformerConfig, sampler: SamplerConfig, prompt: int, batch: int
) -> Parts:
    """One pass over the prompt, whose last state is read, then one for each token but the last."""
    prompt = max(1, prompt)  # an empty prompt begins with the token that a document begins with
    visible = row_pairs(prompt, 1)
    filling = Span(
        positions=Extent.of(prompt) * batch,
        pairs=visible * batch,
        outputs=Extent(1, prompt) * batch,
        output_pairs=Extent(prompt, visible.executed) * batch,
    )
    # Token k of those that are fed back sees the prompt and k tokens, itself included.
    fed_back = sampler.max_new_tokens - 1
    pairs = fed_back * prompt + fed_back * (fed_back + 1) // 2
    following = Span.all_read(fed_back * batch, Extent.of(pairs) * batch)
    passes = added(
        transformer_pass(config, filling, Extent.of(batch), NO_BACKWARD),
        transformer_pass(config, following, Extent.of(fed_back * batch), NO_BACKWARD),
    )
    return named("transformer", passes)
