"""Cola DLM's workloads of `cola-train bench`: settings over the config's defaults."""

# Small enough for one thread of a CPU: the DiT alone trains, on latents of a frozen VAE.
_FROZEN_VAE = (
    "init_vae_from=random",
    "objective.vae_strategy.mode=fix",
    "trainer.precision=fp32",
    "vae.block_size=1",
    "dit.block_size=16",
)
_PAPER_STAGE2 = (
    "init_vae_from=random",
    "vae.block_size=1",
    "dit.block_size=16",
    "budget.nominal_parameters=1800000000",
)


def _sizes(
    vocab_size: int, vae_dim: int, vae_blocks: int, layers: int, dim: int, heads: int, rope_dim: int
) -> tuple[str, ...]:
    return (
        f"vae.vocab_size={vocab_size}",
        f"vae.dim={vae_dim}",
        f"vae.ffn_dim={4 * vae_dim}",
        "vae.num_heads=4",
        f"vae.encoder_num_blocks={vae_blocks}",
        f"vae.decoder_num_blocks={vae_blocks}",
        f"dit.num_layers={layers}",
        f"dit.txt_dim={dim}",
        f"dit.emb_dim={dim}",
        f"dit.heads={heads}",
        f"dit.head_dim={dim // heads}",
        f"dit.rope_dim={rope_dim}",
    )


def _batch(rows: int, seq_len: int) -> tuple[str, ...]:
    return (
        f"trainer.micro_batch_size={rows}",
        f"trainer.global_batch_size={rows}",
        f"data.seq_len={seq_len}",
    )


STAGE1 = {"paper_stage1": ("vae.block_size=1", *_batch(8, 512))}
STAGE2 = {
    "S": (*_FROZEN_VAE, *_sizes(1024, 128, 2, 4, 128, 4, 24), *_batch(8, 256)),
    "M": (*_FROZEN_VAE, *_sizes(4096, 256, 4, 8, 384, 6, 48), *_batch(2, 512)),
    "paper_stage2": (*_PAPER_STAGE2, *_batch(8, 512)),
}
GENERATION = {"S": "S", "M": "M", "paper": "paper_stage2"}
