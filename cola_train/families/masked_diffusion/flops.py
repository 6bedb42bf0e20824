"""What generating text by masked diffusion costs, from the network's config alone."""

from cola_train.config.sampling import SamplerConfig
from cola_train.families.transformer.flops import transformer_pass
from cola_train.flops.passes import Span, named, times
from cola_train.flops.work import NO_BACKWARD, Extent, Parts
from cola_train.models.config import TransformerConfig


def generation_work(
    config: TransformerConfig, sampler: SamplerConfig, prompt: int, batch: int
) -> Parts:
    """Every step runs on the whole row, and the head on what is generated."""
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
