"""Parameters, from the config alone, by part of the network."""

from collections.abc import Iterable

from cola_train.config.baselines import TransformerConfig
from cola_train.config.models import DiTConfig, TextVAEConfig
from cola_train.config.runs import AutoregressiveRunConfig, BaselineRunConfig, JointRunConfig, RunConfig, VAERunConfig
from cola_train.flops import shapes
from cola_train.flops.work import Linear


def parameters_by_part(config: RunConfig) -> dict[str, int]:
    """Weights and biases that a run holds and trains, by part; the frozen reference encoder is a copy and not among them.

    `linear` are the projections of the body, `norms` its norms, `embedding` the token embedding ([mask]'s row included), `head` the
    vocabulary head, `adaln` the time embedding and what modulates by it.
    """
    if isinstance(config, BaselineRunConfig):
        return _named("transformer", _transformer(config.transformer, causal=isinstance(config, AutoregressiveRunConfig)))
    assert isinstance(config, (VAERunConfig, JointRunConfig))
    parts = {**_named("vae.encoder", _encoder(config.vae)), **_named("vae.decoder", _decoder(config.vae))}
    return parts | _named("dit", _dit(config.dit)) if isinstance(config, JointRunConfig) else parts


def network_parameters(config: RunConfig) -> dict[str, int]:
    """The same by network: vae, dit, transformer."""
    networks: dict[str, int] = {}
    for part, count in parameters_by_part(config).items():
        network = part.split(".")[0]
        networks[network] = networks.get(network, 0) + count
    return networks


def backbone_parameters(config: RunConfig) -> int:
    """N of the paper's 6 N D: the DiT; a baseline, or stage 1's VAE, without token embedding and vocabulary head."""
    if isinstance(config, JointRunConfig):
        return network_parameters(config)["dit"]
    return sum(count for part, count in parameters_by_part(config).items() if not part.endswith((".embedding", ".head")))


def _named(network: str, parts: dict[str, int]) -> dict[str, int]:
    return {f"{network}.{name}": count for name, count in parts.items()}


def _total(layers: Iterable[Linear]) -> int:
    return sum(layer.parameters for layer in layers)


def _encoder(config: TextVAEConfig) -> dict[str, int]:
    block, count = shapes.vae_block(config), config.encoder_num_blocks
    around = (shapes.vae_patch(config), shapes.vae_posterior(config))
    return {
        "embedding": (config.vocab_size + 1) * config.dim,
        "linear": count * _total(block.linears) + _total(around),
        "norms": count * block.norms,
    }


def _decoder(config: TextVAEConfig) -> dict[str, int]:
    block, count = shapes.vae_block(config), config.decoder_num_blocks
    around = (shapes.vae_latents_in(config), shapes.vae_unpatch(config))
    return {
        "linear": count * _total(block.linears) + _total(around),
        "norms": count * block.norms + 2 * config.dim,
        "head": shapes.vae_head(config).parameters,
    }


def _dit(config: DiTConfig) -> dict[str, int]:
    block, count = shapes.dit_block(config), config.num_layers
    times = (shapes.dit_time_in(config), *shapes.dit_time(config))
    return {
        "linear": count * _total(block.linears) + _total((shapes.dit_latents_in(config), shapes.dit_velocity(config))),
        "adaln": count * shapes.dit_modulation(config).parameters + _total(times),
        "norms": count * block.norms + 2 * config.txt_dim,
    }


def _transformer(config: TransformerConfig, causal: bool) -> dict[str, int]:
    block, count = shapes.transformer_block(config), config.num_hidden_layers
    return {
        "embedding": (config.vocab_size + (not causal)) * config.hidden_size,
        "linear": count * _total(block.linears),
        "norms": count * block.norms + config.hidden_size,
        "head": shapes.transformer_head(config).parameters,
    }
