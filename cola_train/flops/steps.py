"""What optimizer steps cost, by three conventions, from the run's config alone."""

from cola_train.config.amounts import Amount
from cola_train.config.loop import Convention
from cola_train.config.runs import (
    AutoregressiveRunConfig,
    BaselineRunConfig,
    JointRunConfig,
    LLaDARunConfig,
    RunConfig,
    VAERunConfig,
)
from cola_train.flops import networks
from cola_train.flops.networks import Parts, Span, row_pairs, visible_pairs
from cola_train.flops.parameters import backbone_parameters
from cola_train.flops.work import NO_BACKWARD, Backward, Extent, Work
from cola_train.models.tiles import packed_tiles

CONVENTIONS: dict[Convention, str] = {
    "paper": "6 x N x D: N is budget.nominal_parameters, or else the parameters of the backbone (the DiT; a baseline, or stage 1's "
    "VAE, without token embedding and vocabulary head); D is the tokens of the step, padding included.",
    "model": "What this architecture needs: matrix products, the patch convolution and attention over visible pairs, forward and "
    "backward, 2 per multiply-add. Nothing that is computed twice, nothing of the clean half's last hidden states in the DiT, "
    "which nobody reads; adaLN once per distinct time of the step. What depends on the data (padding, documents that are kept "
    "apart, hidden histories) is not subtracted.",
    "executed": "What kernels compute, as torch's FlopCounterMode counts it: attention over whole tiles of pairs (models/tiles.py; "
    "a kernel without a mask takes whole rows, and leaves out nearly half of a causal one), every position that runs, adaLN once "
    "per distinct time of a micro-batch, what activation checkpointing computes again, and the scores that the fused attention "
    "backward computes again.",
}


def step_parts(config: RunConfig, trains_vae: bool = True) -> Parts:
    """The work of one optimizer step over all its rows, by part of the networks.

    `linear` are the projections and the patch convolution, `attention` its products, `head` the vocabulary head, `adaln` the time
    embedding and what modulates by it.

    Args:
        config: of any stage.
        trains_vae: whether the VAE takes part (stage 2, see VAEStrategyConfig).
    """
    backward = Backward(runs=True, recomputes_blocks=config.parallel.activation_checkpointing == "full")
    if isinstance(config, BaselineRunConfig):
        return networks.named("transformer", _transformer(config, backward))
    if isinstance(config, VAERunConfig):
        return _vae(config, backward)
    assert isinstance(config, JointRunConfig)
    vae = _vae(config, backward) | _reference(config) if trains_vae else _encoder_alone(config, "vae.encoder")
    return vae | networks.named("dit", _dit(config, backward, trains_vae))


def step_flops(config: RunConfig, step: int) -> dict[Convention, int]:
    """FLOPs of optimizer step `step`, counted from 0, over all processes, by convention."""
    strategy = config.objective.vae_strategy if isinstance(config, JointRunConfig) else None
    return _phase_flops(config, strategy is None or strategy.trains_vae(step))


def flops_after(config: RunConfig, steps: int) -> dict[Convention, int]:
    """FLOPs of a run's first `steps` steps, by convention."""
    cycle = _cycle(config)
    whole, rest = divmod(steps, sum(number for number, _ in cycle))
    total = dict.fromkeys(CONVENTIONS, 0)
    for number, flops in cycle:
        done = min(rest, number)
        rest -= done
        for convention in total:
            total[convention] += (whole * number + done) * flops[convention]
    return total


def steps_to(config: RunConfig, amount: Amount) -> int:
    """The fewest steps after which a run has come as far as `amount`; EFLOPs are counted by budget.convention."""
    if amount.unit == "steps":
        return amount.count
    if amount.unit == "tokens":
        return -(-amount.count // _tokens(config))
    phases = [(number, flops[config.budget.convention]) for number, flops in _cycle(config)]
    whole, rest = divmod(amount.count, sum(number * flops for number, flops in phases))
    steps = whole * sum(number for number, _ in phases)
    for number, flops in phases:
        needed = min(number, -(-rest // flops))
        steps, rest = steps + needed, max(0, rest - needed * flops)
    return steps


def _cycle(config: RunConfig) -> list[tuple[int, dict[Convention, int]]]:
    """What steps repeat: phases as their number of steps and the FLOPs of each."""
    if not isinstance(config, JointRunConfig) or config.objective.vae_strategy.mode != "interval":
        return [(1, step_flops(config, 0))]
    strategy = config.objective.vae_strategy
    return [
        (strategy.joint_steps, _phase_flops(config, trains_vae=True)),
        (strategy.frozen_steps, _phase_flops(config, trains_vae=False)),
    ]


def _phase_flops(config: RunConfig, trains_vae: bool) -> dict[Convention, int]:
    total = sum(step_parts(config, trains_vae).values(), Work())
    parameters = config.budget.nominal_parameters or backbone_parameters(config)
    return {"paper": 6 * parameters * _tokens(config), "model": total.model, "executed": total.executed}


def _tokens(config: RunConfig) -> int:
    return config.trainer.global_batch_size * config.data.seq_len


def _clean_rows(config: VAERunConfig | JointRunConfig, rows: int) -> Span:
    """Rows of latents through the VAE."""
    latents = config.data.seq_len // config.vae.patch_size
    pairs = row_pairs(latents, config.vae.block_size, config.objective.mask_documents)
    return Span.all_read(rows * latents, pairs * rows)


def _vae(config: VAERunConfig | JointRunConfig, backward: Backward) -> Parts:
    """`vae_pass`: clean and masked copies through encoder and decoder, the head at clean tokens and at masked ones."""
    rows, seq, objective = config.trainer.global_batch_size, config.data.seq_len, config.objective
    masks = objective.mask_weight > 0
    # As many as objectives/losses.py's mask_positions replaces.
    masked = max(1, round(objective.mask_ratio * seq)) if masks else 0
    span = _clean_rows(config, 2 * rows if masks else rows)
    encoder = networks.encoder_pass(config.vae, span, backward)
    decoder = networks.decoder_pass(config.vae, span, Extent.of(rows * (seq + masked)), backward)
    return networks.named("vae.encoder", encoder) | networks.named("vae.decoder", decoder)


def _encoder_alone(config: JointRunConfig, name: str) -> Parts:
    span = _clean_rows(config, config.trainer.global_batch_size)
    return networks.named(name, networks.encoder_pass(config.vae, span, NO_BACKWARD))


def _reference(config: JointRunConfig) -> Parts:
    return _encoder_alone(config, "reference_encoder") if config.objective.reference_weight > 0 else {}


def _dit(config: JointRunConfig, backward: Backward, trains_vae: bool) -> Parts:
    """`BlockCausalDiT.velocity`: all blocks of each noised copy of a row, and its clean blocks but the last as history."""
    rows, flow, block_size = config.trainer.global_batch_size, config.objective.flow, config.dit.block_size
    latents = config.data.seq_len // config.vae.patch_size
    clean, copies = latents - block_size, flow.noise_copies
    # A noised block sees itself and all clean blocks before it: as many pairs as if all were clean.
    noised_pairs, clean_pairs = copies * visible_pairs(latents, block_size), visible_pairs(clean, block_size)
    tiles = packed_tiles(latents, block_size, copies)
    noised_tiles = [tile for tile in tiles if tile.queries[0] < copies * latents]
    span = Span(
        positions=Extent.of(clean + copies * latents) * rows,
        pairs=Extent(clean_pairs + noised_pairs, sum(tile.pairs for tile in tiles)) * rows,
        outputs=Extent.of(copies * latents) * rows,
        output_pairs=Extent(noised_pairs, sum(tile.pairs for tile in noised_tiles)) * rows,
    )
    drawn = rows * copies * (latents // block_size if flow.timestep_per == "block" else 1)
    # Beside the times that are drawn there is that of clean positions, 0.
    distinct = Extent(drawn + 1, drawn + rows // config.trainer.micro_batch_size)
    return networks.dit_pass(config.dit, span, distinct, backward, input_gradient=trains_vae and flow.grad_to_encoder)


def _transformer(config: BaselineRunConfig, backward: Backward) -> Parts:
    rows, seq = config.trainer.global_batch_size, config.data.seq_len
    causal = isinstance(config, AutoregressiveRunConfig)
    assert isinstance(config, AutoregressiveRunConfig | LLaDARunConfig)
    documents = config.objective.mask_documents
    span = Span.all_read(rows * seq, row_pairs(seq, 1 if causal else seq, documents) * rows)
    # The last token of a row predicts nothing.
    logits = Extent.of(rows * (seq - causal))
    return networks.transformer_pass(config.transformer, span, logits, backward)
