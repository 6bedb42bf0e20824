"""What our code computes from a family's checkpoint and inputs: make.py writes it, the tests
compare with what was written.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cola_train.config.sampling import SamplerConfig
from cola_train.data.batch import Batch
from cola_train.families.autoregressive.family import AutoregressiveConfig
from cola_train.families.autoregressive.objective import AutoregressiveObjective
from cola_train.families.cola.checkpoint import ColaCheckpoint
from cola_train.families.cola.losses import FlowConfig, Stage1Config, Stage2Config
from cola_train.families.cola.stage1 import Stage1Objective, mask_positions
from cola_train.families.cola.stage2 import Stage2Objective, flow_draws
from cola_train.families.generate import generate
from cola_train.families.masked_diffusion.objective import MaskedDiffusionObjective
from cola_train.families.transformer.checkpoint import TransformerCheckpoint
from cola_train.flow import interpolate
from cola_train.models.dit import BlockCausalDiT
from cola_train.models.initialize import transformer_value
from cola_train.models.modulation import Times
from cola_train.models.text_vae import TextVAE
from cola_train.objectives.objective import Objective
from cola_train.randomness import Purpose, named_generator, normal, uniform
from tests.golden.families import AnyCheckpoint, Settings, networks_of
from tests.helpers.initial import initialize_dit, initialize_text_vae
from tests.helpers.losses import losses_of

LOSS_SEED = 11

FoundLosses = dict[str, dict[str, float]]


@torch.no_grad()
def forward(checkpoint: AnyCheckpoint, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every network's output for its inputs, with documents together and apart."""
    if isinstance(checkpoint, TransformerCheckpoint):
        network, tokens = checkpoint.transformer, inputs["tokens"]
        return {
            "logits": network.head(network(tokens)),
            "documents/logits": network.head(network(tokens, inputs["document_ids"])),
        }
    vae, dit = checkpoint.vae, checkpoint.dit
    assert dit is not None
    document = inputs["document_ids"][:, :: vae.config.patch_size]
    latents, t, num_latents = inputs["latents"], inputs["t"], inputs["latents"].shape[1]
    out = {"z_t": interpolate(latents, inputs["eps"], t[:, None, None])}
    for name, apart in (("", None), ("documents/", document)):
        posterior = vae.encode(inputs["tokens"], apart)
        out |= {
            f"{name}mean": posterior.mean,
            f"{name}logvar": posterior.logvar,
            f"{name}z_0": posterior.sample(inputs["eps"]),
        }
        out[f"{name}logits"] = vae.decode(latents, apart)
        for copies in (1, 2):
            noised, pinned, shown = (
                inputs[field][:, : copies * num_latents]
                for field in ("noised", "pinned", "sees_history")
            )
            z_t = torch.where(pinned[..., None], latents.repeat(1, copies, 1), noised)
            index = torch.where(pinned, len(t), torch.arange(len(t))[:, None])
            times = Times(torch.cat([t, torch.zeros(1)]), index)
            out[f"{name}velocity/{copies}"] = dit.velocity(z_t, latents, times, apart)
            out[f"{name}velocity/{copies}/hidden_history"] = dit.velocity(
                z_t, latents, times, apart, shown
            )
    return {name: value.contiguous() for name, value in out.items()}


def losses(
    checkpoint: AnyCheckpoint, inputs: Mapping[str, Tensor], settings: Settings
) -> FoundLosses:
    """A step's figures and its total's gradient: {"counts", "figures", "gradient_norms"}, the last
    by parameter.
    """
    batch = Batch(*(inputs[field] for field in Batch._fields))
    trained = {
        name: copy.deepcopy(network).requires_grad_(True)
        for name, network in networks_of(checkpoint).items()
    }
    objective, step = _objective(trained, settings)
    counts = objective.counts(batch)
    found = losses_of(objective, batch, counts, step)
    found.total.backward()
    norms = {
        f"{network}.{name}": _short(parameter.grad.norm())
        for network, module in trained.items()
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }
    figures = {
        name: _short(value)
        for name, value in {"total": found.total.detach(), **found.values()}.items()
    }
    return {
        "counts": {name: int(count) for name, count in counts.items()},
        "figures": figures,
        "gradient_norms": norms,
    }


def _short(value: Tensor) -> float:
    """As many digits as tell every fp32 number from its neighbors."""
    return float(f"{float(value):.9g}")


def _objective(trained: Mapping[str, Any], settings: Settings) -> tuple[Objective, int | None]:
    if isinstance(settings, Stage1Config):
        return Stage1Objective(trained["vae"], settings, LOSS_SEED), None
    if isinstance(settings, Stage2Config):
        objective = Stage2Objective(trained["vae"], trained["dit"], settings, LOSS_SEED)
        with torch.no_grad():
            # Away from the reference encoder, which was copied just now: where they agree its term
            # is 0 and its gradient too.
            for parameter in trained["vae"].encoder.parameters():
                parameter.mul_(1.1)
        return objective, 0
    if isinstance(settings, AutoregressiveConfig):
        return AutoregressiveObjective(trained["transformer"], settings), None
    return MaskedDiffusionObjective(trained["transformer"], settings, LOSS_SEED), None


def samples(
    checkpoint: AnyCheckpoint, prompts: list[str | list[int]], config: SamplerConfig
) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """What generation makes of each prompt, and of Cola DLM the latents of each, by the prompt's
    number.
    """
    results = generate(checkpoint, prompts, config)
    told = [
        {
            "prompt_ids": result.prompt_ids,
            "decoded_ids": result.decoded_ids,
            "token_ids": result.token_ids,
            "text": result.text,
            "finish_reason": result.finish_reason,
        }
        for result in results
    ]
    return told, {
        str(number): result.latents
        for number, result in enumerate(results)
        if result.latents is not None
    }


def draws() -> dict[str, Tensor]:
    """Addressed draws of every purpose, and what the objectives make of theirs."""
    index = torch.tensor([0, 2**33 + 5, 2**62 + 1])
    found = {}
    for purpose in Purpose:
        found[f"uniform/{purpose.name}"] = uniform(2**40 + 3, purpose, index, 5, 4)
        found[f"normal/{purpose.name}"] = normal(
            2**40 + 3, purpose, index, 5, torch.tensor([0, 4, 8])
        )
    real = torch.arange(20) < torch.tensor([20, 17, 2])[:, None]
    rows = Batch(
        torch.zeros_like(real, dtype=torch.long),
        real,
        torch.zeros_like(real, dtype=torch.long),
        index,
        index,
    )
    found["mask_positions"] = mask_positions(rows, 0.3, LOSS_SEED)
    for time_per in ("sample", "block"):
        config = FlowConfig(
            timestep_per=time_per, prompt_block_prob=0.5, history_dropout=0.4, noise_copies=2
        )
        flow = flow_draws(config, index, 6, 4, LOSS_SEED)
        assert flow.sees_history is not None
        found |= {
            f"{time_per}/t": flow.t,
            f"{time_per}/pinned": flow.pinned,
            f"{time_per}/sees_history": flow.sees_history,
        }
    return {name: value.contiguous() for name, value in found.items()}


def initial_weights(cola: ColaCheckpoint, baseline: TransformerCheckpoint) -> dict[str, Tensor]:
    """Of each parameter as training from scratch draws it: its first values and the mean of its
    squares; and torch's own draws.
    """
    assert cola.dit is not None
    vae, dit, transformer = (
        TextVAE(cola.vae.config),
        BlockCausalDiT(cola.dit.config),
        baseline.transformer,
    )
    initialize_text_vae(vae, LOSS_SEED)
    initialize_dit(dit, LOSS_SEED)
    values = {f"vae/{name}": value for name, value in vae.named_parameters()}
    values |= {f"dit/{name}": value for name, value in dit.named_parameters()}
    values |= {
        f"transformer/{name}": transformer_value(name, value.shape, transformer.config, LOSS_SEED)
        for name, value in transformer.named_parameters()
    }
    heads = {
        name: torch.cat([value.detach().flatten()[:8], value.detach().square().mean()[None]])
        for name, value in values.items()
    }
    # Told apart in the tests: torch may change its generators, and our addressing or filling of
    # weights is not to blame.
    return {**heads, "torch/uniform": torch.rand(8, generator=named_generator(0, "golden"))}
