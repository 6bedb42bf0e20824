"""The Text VAE against loops over positions, hand calculation and the paper's sizes."""

from typing import Any

import pytest
import torch

from cola_train.models.config import TextVAEConfig
from cola_train.models.text_vae import TextVAE
from tests.helpers import naive
from tests.helpers.compare import assert_near, largest_difference
from tests.helpers.tiny import random_latents, random_tokens, tiny_vae

VARIANTS: list[dict[str, Any]] = [
    {},
    {"block_size": 2},
    {"block_size": 4},
    {"patch_size": 2},
    {"patch_size": 3, "block_size": 2},
    {"post_norm": False},
    {"post_norm": False, "block_size": 4, "patch_size": 2},
    {"qk_norm": False},
    {"qk_norm_affine": False},
    {"clip_qkv": 0.5},
    {"clip_qkv": 0.5, "qk_norm": False},
    {"qk_bias": True},
    {"bias": False},
    {"layer_norm_affine": False},
    {"layer_norm_affine": False, "post_norm": False},
    {"rope_theta": 10},
    {"layer_norm_eps": 0.1},
    {"scaling_factor": 0.5, "shifting_factor": 0.25},
]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_encoder_and_decoder_equal_the_loops(changes: dict[str, Any]) -> None:
    vae = tiny_vae(**changes)
    weights = naive.weights_of(vae)
    tokens = random_tokens(2, 12, seed=5)
    tokens[0, 3] = vae.mask_token_id  # the embedding's extra row
    posterior = vae.encode(tokens)
    latents = random_latents(2, 12 // vae.config.patch_size, 4, seed=6)
    logits = vae.decode(latents)
    for row in range(2):
        mean, logvar = naive.encode(vae.config, weights, tokens[row].tolist())
        assert_near(posterior.mean[row], mean)
        assert_near(posterior.logvar[row], logvar)
        assert_near(logits[row], naive.decode(vae.config, weights, latents[row].double().numpy()))
    assert logits.shape == (2, 12, vae.config.vocab_size)


@pytest.mark.parametrize(
    "changes", [changes for changes in VARIANTS[1:] if "patch_size" not in changes], ids=str
)
def test_every_variant_matters(changes: dict[str, Any]) -> None:
    """Else the comparison above could pass for want of a difference: here the setting alone moves
    the result.
    """
    vae, plain = tiny_vae(**changes), tiny_vae()
    weights = naive.weights_of(vae)
    plain.load_state_dict(
        {name: torch.tensor(weights[name]) for name in plain.state_dict() if name in weights},
        strict=False,
    )
    tokens = random_tokens(1, 12, seed=5)
    assert largest_difference(vae.encode(tokens).mean, plain.encode(tokens).mean) > 1e-3


def test_documents_are_kept_apart_in_the_loops_too() -> None:
    documents = [0, 0, 0, 0, 1, 1, 2, 2]
    vae = tiny_vae(block_size=2, patch_size=2)
    weights = naive.weights_of(vae)
    tokens, latents = random_tokens(1, 16, seed=7), random_latents(1, 8, 4, seed=8)
    posterior = vae.encode(tokens, torch.tensor([documents]))
    logits = vae.decode(latents, torch.tensor([documents]))
    mean, _ = naive.encode(vae.config, weights, tokens[0].tolist(), documents)
    assert_near(posterior.mean[0], mean)
    assert_near(
        logits[0], naive.decode(vae.config, weights, latents[0].double().numpy(), documents)
    )
    assert largest_difference(posterior.mean, vae.encode(tokens).mean) > 1e-3


@pytest.mark.parametrize(("scale", "shift"), [(2.0, 0.0), (1.0, -0.7), (0.25, 3.0), (-1.5, 0.4)])
def test_scaling_is_applied_on_the_way_out_and_undone_on_the_way_in(
    scale: float, shift: float
) -> None:
    plain, scaled = tiny_vae(), tiny_vae(scaling_factor=scale, shifting_factor=shift)
    tokens, eps = random_tokens(2, 8, seed=9), random_latents(2, 8, 4, seed=10)
    raw, normalized = plain.encode(tokens), scaled.encode(tokens)
    assert_near(normalized.mean, (raw.mean - shift) * scale)
    assert_near(normalized.logvar, raw.logvar + 2 * torch.tensor(scale).abs().log())
    # A sample of the one is the scaled sample of the other (eps turned where the scale is
    # negative), and decodes alike.
    sample = raw.sample(eps)
    assert_near(normalized.sample(eps if scale > 0 else -eps), (sample - shift) * scale)
    assert_near(scaled.decode((sample - shift) * scale), plain.decode(sample))


def test_posterior_mean_is_normed_and_logvar_clamped() -> None:
    vae = tiny_vae()
    with torch.no_grad():
        vae.encoder.final_layer.bias[4:].copy_(torch.tensor([-100.0, 100.0, -29.0, 19.0]))
    posterior = vae.encode(random_tokens(2, 8, seed=11))
    # var / (var + eps) of the raw mean: 1 but for the norm's epsilon.
    assert_near(posterior.mean.square().mean(-1), torch.ones(2, 8), 1e-3)
    assert_near(posterior.mean.mean(-1), torch.zeros(2, 8))
    assert (posterior.logvar[..., 0] == -30).all()
    assert (posterior.logvar[..., 1] == 20).all()
    inside = posterior.logvar[..., 2:]
    assert ((inside > -30) & (inside < 20)).any()


def shapes_by_the_format(config: TextVAEConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor's name and shape, from the format's table."""
    d, v, c, p = config.dim, config.vocab_size, config.latent_dim, config.patch_size
    shapes: dict[str, tuple[int, ...]] = {"encoder.wte.weight": (v + 1, d)}

    def add(name: str, weight: tuple[int, ...], bias: bool) -> None:
        shapes[f"{name}.weight"] = weight
        if bias:
            shapes[f"{name}.bias"] = weight[:1]

    add("encoder.patch_embedder", (d, d, p), True)
    add("decoder.unpatch_layer", (p * d, d), True)
    add("decoder.final_norm", (d,), True)
    add("encoder.final_layer", (2 * c, d), config.bias)
    add("decoder.in_layer", (d, c), config.bias)
    add("decoder.final_layer", (v, d), config.bias)
    blocks = [f"encoder.blocks.{n}" for n in range(config.encoder_num_blocks)]
    blocks += [f"decoder.blocks.{n}" for n in range(config.decoder_num_blocks)]
    for block in blocks:
        for norm in ["norm_ffn"] + ["norm_attn"] * config.layer_norm_affine:
            add(f"{block}.{norm}", (d,), True)
        for norm in ["q_norm", "k_norm"] * (config.qk_norm and config.qk_norm_affine):
            add(f"{block}.{norm}", (d,), True)
        add(f"{block}.qkv_proj", (3 * d, d), config.qk_bias)
        add(f"{block}.attn_out_proj", (d, d), config.bias)
        add(f"{block}.ffn_proj", (config.ffn_dim, d), config.bias)
        add(f"{block}.ffn_out", (d, config.ffn_dim // 2), config.bias)
    return shapes


@pytest.mark.parametrize(
    "changes", [*VARIANTS, {"encoder_num_blocks": 1, "decoder_num_blocks": 3}], ids=str
)
def test_tensors_are_the_formats(changes: dict[str, Any]) -> None:
    vae = tiny_vae(**changes)
    assert {
        name: tuple(tensor.shape) for name, tensor in vae.state_dict().items()
    } == shapes_by_the_format(vae.config)


def test_the_paper_size() -> None:
    with torch.device("meta"):
        vae = TextVAE(TextVAEConfig(block_size=1))
    assert sum(parameter.numel() for parameter in vae.parameters()) == 501_871_574
    assert vae.mask_token_id == 100_278
