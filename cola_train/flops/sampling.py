"""What generating text costs, from the run's config alone: prompts of one length, in one batch, none of which stops early."""

from cola_train.config.runs import AutoregressiveRunConfig, BaselineRunConfig, JointRunConfig, RunConfig
from cola_train.config.sampling import SamplerConfig, evaluated_steps
from cola_train.config.settings import require
from cola_train.flops import networks
from cola_train.flops.networks import Parts, Span, row_pairs, visible_pairs
from cola_train.flops.work import NO_BACKWARD, Extent


def generation_parts(config: RunConfig, sampler: SamplerConfig, prompt_tokens: int, batch: int) -> Parts:
    """The work of continuing `batch` prompts of `prompt_tokens` each by sampler.max_new_tokens, by part of the networks.

    Useful (`model`) leaves out hidden pairs, and last hidden states that fill a cache or belong to a prompt: nobody reads them.

    Raises:
        UserError: the run is of stage 1, which generates nothing.
    """
    if isinstance(config, JointRunConfig):
        return _blocks(config, sampler, prompt_tokens, batch)
    require(isinstance(config, BaselineRunConfig),
            f"{config.name} trains a Text VAE, which writes no text by itself; give a joint, ar or llada config.")  # fmt: skip
    assert isinstance(config, BaselineRunConfig)
    generate = _one_by_one if isinstance(config, AutoregressiveRunConfig) else _all_at_once
    return networks.named("transformer", generate(config, sampler, prompt_tokens, batch))


def _one_by_one(config: BaselineRunConfig, sampler: SamplerConfig, prompt: int, batch: int) -> Parts:
    """The prompt in one pass, of which the last state is read, then a pass for each token but the last."""
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
    return networks.added(
        networks.transformer_pass(config.transformer, filling, Extent.of(batch), NO_BACKWARD),
        networks.transformer_pass(config.transformer, following, Extent.of(fed_back * batch), NO_BACKWARD),
    )


def _all_at_once(config: BaselineRunConfig, sampler: SamplerConfig, prompt: int, batch: int) -> Parts:
    """Every step runs on the whole row, and the head on what is generated."""
    new = sampler.max_new_tokens
    length = max(1, prompt) + new  # an empty prompt begins with the token that a document begins with
    span = Span(
        positions=Extent.of(length) * batch,
        pairs=Extent.of(length**2) * batch,
        outputs=Extent(new, length) * batch,
        output_pairs=Extent(new * length, length**2) * batch,
    )
    step = networks.transformer_pass(config.transformer, span, Extent.of(new) * batch, NO_BACKWARD)
    return networks.times(step, min(sampler.num_steps, new))


def _blocks(config: JointRunConfig, sampler: SamplerConfig, prompt: int, batch: int) -> Parts:
    """Whole blocks of the prompt fill the caches; then every block is transported, decoded and, if another follows, committed."""
    patch_size, block_size = config.vae.patch_size, config.dit.block_size
    block_tokens = patch_size * block_size
    latents = -(-prompt // patch_size)
    history = latents // block_size
    known_tokens = max(0, prompt - history * block_tokens)
    num_blocks = -(-(known_tokens + sampler.max_new_tokens) // block_tokens)

    read = max(1, -(-prompt // block_tokens)) * block_size
    encoder = Span.all_read(read * batch, row_pairs(read, config.vae.block_size) * batch)
    vae = networks.named("vae.encoder", networks.encoder_pass(config.vae, encoder, NO_BACKWARD))
    passes = [vae, _schedule(config, sampler, reads_clean=prompt > 0 or num_blocks > 1)]
    if history:
        filled = history * block_size
        pairs = row_pairs(filled, config.vae.block_size) * batch
        decoder = networks.decoder_pass(config.vae, Span.none_read(filled * batch, pairs), Extent.of(0), NO_BACKWARD)
        passes += [networks.named("vae.decoder", decoder), _commit(config, row_pairs(filled, block_size), filled, batch)]
    times = [1 - step / sampler.num_steps for step in evaluated_steps(sampler.solver, sampler.num_steps)]
    for block in range(num_blocks):
        before = (history + block) * block_size
        guided = sum(before > 0 and sampler.guides_at(t) for t in times)
        passes.append(networks.times(_velocity(config, before, batch, guided=True), guided))
        passes.append(networks.times(_velocity(config, before, batch, guided=False), len(times) - guided))
        passes.append(_decode(config, before, batch))
        if block < num_blocks - 1:
            passes.append(_commit(config, Extent.of(block_size * (before + block_size)), block_size, batch))
    return networks.added(*passes)


def _schedule(config: JointRunConfig, sampler: SamplerConfig, reads_clean: bool) -> Parts:
    """adaLN, once for every time of the schedule; the last, t = 0, is that of known latents and of blocks that fill the cache."""
    times = Extent(sampler.num_steps + reads_clean, sampler.num_steps + 1)
    nothing = Span.all_read(0, Extent.of(0))
    return networks.named("dit", networks.dit_pass(config.dit, nothing, times, NO_BACKWARD, input_gradient=False))


def _velocity(config: JointRunConfig, before: int, batch: int, guided: bool) -> Parts:
    """A network call of the solver; guided, an unconditional branch that sees the block alone goes along."""
    size = config.dit.block_size
    pairs = Extent.of(batch * size * (before + size + size * guided))
    span = Span.all_read(batch * size * (1 + guided), pairs)
    return networks.named("dit", networks.dit_pass(config.dit, span, Extent.of(0), NO_BACKWARD, input_gradient=False))


def _commit(config: JointRunConfig, pairs: Extent, positions: int, batch: int) -> Parts:
    """One clean pass whose keys and values stay in the DiT's cache; the last block computes nothing else."""
    span = Span(Extent.of(positions) * batch, pairs * batch, Extent.of(0), Extent.of(0))
    return networks.named("dit", networks.dit_pass(config.dit, span, Extent.of(0), NO_BACKWARD, input_gradient=False))


def _decode(config: JointRunConfig, before: int, batch: int) -> Parts:
    size = config.dit.block_size
    pairs = Extent(size * before + visible_pairs(size, config.vae.block_size), size * (before + size)) * batch
    span = Span.all_read(batch * size, pairs)
    logits = Extent.of(batch * size * config.vae.patch_size)
    return networks.named("vae.decoder", networks.decoder_pass(config.vae, span, logits, NO_BACKWARD))
