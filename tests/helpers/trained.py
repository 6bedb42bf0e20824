"""A tiny Cola DLM that has learned its text: a chain in which three words may follow a word."""

import torch
from torch import Tensor

from cola_train.families.cola.checkpoint import ColaCheckpoint
from cola_train.families.cola.losses import FlowConfig, Stage2Config
from cola_train.families.cola.stage2 import Stage2Objective
from cola_train.objectives.objective import total_loss
from tests.helpers.tiny import make_batch, tiny_checkpoint, tiny_dit, tiny_vae

FIRST, LAST = 6, 29  # ids of the words
SHARES = torch.tensor([0.6, 0.3, 0.1])


def chain_texts(rows: int, length: int, seed: int) -> Tensor:
    """Texts of the chain: after word w come 5 w + 1, 5 w + 2 or 5 w + 3, by `SHARES`."""
    generator = torch.Generator().manual_seed(seed)
    words = [torch.randint(LAST - FIRST, (rows,), generator=generator)]
    for _ in range(length - 1):
        choice = torch.multinomial(SHARES.expand(rows, 3), 1, generator=generator)[:, 0]
        words.append((5 * words[-1] + 1 + choice) % (LAST - FIRST))
    return torch.stack(words, dim=1) + FIRST


def trained_checkpoint(steps: int = 400) -> ColaCheckpoint:
    """A VAE and a DiT with blocks of 4 latents, trained together for some seconds."""
    vae, dit = (
        tiny_vae(latent_dim=8),
        tiny_dit(
            txt_in_channels=8, txt_out_channels=8, txt_dim=32, emb_dim=32, heads=2, head_dim=16
        ),
    )
    config = Stage2Config(
        mask_weight=0.0,
        reference_weight=0.0,
        fixed_log_snr=4.5,
        flow=FlowConfig(time_distribution="uniform", timestep_per="block", grad_to_encoder=False),
    )
    objective = Stage2Objective(vae, dit, config, seed=3)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=steps)
    for step in range(steps):
        batch = make_batch(chain_texts(24, 24, seed=step), [0] * 24, first_index=24 * step)
        optimizer.zero_grad()
        total_loss(objective(batch, step), objective.counts(batch)).backward()
        torch.nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        # What training held: a logSNR of 4.5.
        half = vae.config.latent_dim
        vae.encoder.final_layer.weight[half:].zero_()
        vae.encoder.final_layer.bias[half:].fill_(-4.5)
    return tiny_checkpoint(vae, dit)
