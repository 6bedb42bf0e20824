"""Cola DLM's workloads of `cola-train bench`: settings over the config's defaults."""

# Small enough for one thread of a CPU: the DiT alone trains, on latents of a frozen VAE.
_FROZEN_VAE = (
    "init_vae_from=random",
    "objective.vae_strategy.mode=fix",
    "trainer.precision=fp32",
    "vae.block_size=1",
    "dit.block_size=16",
)
_S = (
    "vae.vocab_size=1024",
    "vae.dim=128",
    "vae.ffn_dim=512",
    "vae.num_heads=4",
    "vae.encoder_num_blocks=2",
    "vae.decoder_num_blocks=2",
    "dit.num_layers=4",
    "dit.txt_dim=128",
    "dit.emb_dim=128",
    "dit.heads=4",
    "dit.head_dim=32",
    "dit.rope_dim=24",
)
_M = (
    "vae.vocab_size=4096",
    "vae.dim=256",
    "vae.ffn_dim=1024",
    "vae.num_heads=4",
    "vae.encoder_num_blocks=4",
    "vae.decoder_num_blocks=4",
    "dit.num_layers=8",
    "dit.txt_dim=384",
    "dit.emb_dim=384",
    "dit.heads=6",
    "dit.head_dim=64",
    "dit.rope_dim=48",
)
_PAPER_STAGE2 = (
    "init_vae_from=random",
    "vae.block_size=1",
    "dit.block_size=16",
    "budget.nominal_parameters=1800000000",
)


def _batch(rows: int, seq_len: int) -> tuple[str, ...]:
    return (
        f"trainer.micro_batch_size={rows}",
        f"trainer.global_batch_size={rows}",
        f"data.seq_len={seq_len}",
    )


STAGE1_WORKLOADS = {"paper_stage1": ("vae.block_size=1", *_batch(8, 512))}
STAGE2_WORKLOADS = {
    "S": (*_FROZEN_VAE, *_S, *_batch(8, 256)),
    "M": (*_FROZEN_VAE, *_M, *_batch(2, 512)),
    "paper_stage2": (*_PAPER_STAGE2, *_batch(8, 512)),
}
GENERATION_WORKLOADS = {"S": "S", "M": "M", "paper": "paper_stage2"}
