"""What the golden set is of: the families of tiny networks, their weights and inputs, the settings
they are asked under.

Weights and inputs are functions of (seed, name) through our own addressed draws, so torch's
generators play no part in them; they are stored all the same, and the tests read what is stored.
"""

import dataclasses
import zlib
from pathlib import Path

import torch
from torch import Tensor, nn

from cola_train.config.sampling import SamplerConfig
from cola_train.data.tokenizer import TRAINED_SPECIAL_TOKENS
from cola_train.families.autoregressive.checkpoint import AutoregressiveCheckpoint
from cola_train.families.autoregressive.family import AutoregressiveConfig
from cola_train.families.cola.checkpoint import ColaCheckpoint
from cola_train.families.cola.losses import (
    FlowConfig,
    Stage1Config,
    Stage2Config,
    VAEStrategyConfig,
)
from cola_train.families.masked_diffusion.checkpoint import MaskedDiffusionCheckpoint
from cola_train.families.masked_diffusion.family import MaskedDiffusionConfig
from cola_train.families.transformer.checkpoint import TransformerCheckpoint
from cola_train.models.config import DiTConfig, TextVAEConfig, TransformerConfig
from cola_train.models.dit import BlockCausalDiT
from cola_train.models.text_vae import TextVAE
from cola_train.models.transformer import Transformer
from cola_train.randomness import Purpose, normal, uniform
from tests.helpers.tiny import PAD, tiny_tokenizer

FOLDER = Path(__file__).parent
ROWS, LATENTS, SEED = 3, 24, 20
_VOCAB = 29
_TRANSFORMER = TransformerConfig(
    vocab_size=_VOCAB,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    head_dim=8,
)
# A small velocity keeps a sampler's many passes and its guidance from blowing rounding up;
# log-variances near 0 keep the posterior's noise from drowning everything else in the flow's loss.
_CALM = {"txt_out.proj.weight": 0.4, "encoder.final_layer.weight": 0.3}

Settings = Stage1Config | Stage2Config | AutoregressiveConfig | MaskedDiffusionConfig
AnyCheckpoint = ColaCheckpoint | TransformerCheckpoint


def _vae(block_size: int, **changes: object) -> TextVAEConfig:
    plain = TextVAEConfig(
        vocab_size=_VOCAB,
        encoder_num_blocks=2,
        decoder_num_blocks=2,
        dim=16,
        ffn_dim=24,
        latent_dim=8,
        num_heads=2,
        block_size=1,
    )
    return dataclasses.replace(plain, block_size=block_size, **changes)  # type: ignore[arg-type]


def _dit(block_size: int, **changes: object) -> DiTConfig:
    plain = DiTConfig(
        txt_in_channels=8,
        txt_out_channels=8,
        txt_dim=16,
        emb_dim=16,
        heads=2,
        head_dim=8,
        expand_ratio=2,
        num_layers=2,
        rope_dim=6,
    )
    return dataclasses.replace(plain, block_size=block_size, **changes)  # type: ignore[arg-type]


COLA: dict[str, tuple[TextVAEConfig, DiTConfig]] = {
    "base": (_vae(4), _dit(4)),
    "strict": (
        _vae(1, dim=18, num_heads=3),
        _dit(4, txt_dim=12, emb_dim=12, heads=1, head_dim=12, num_layers=3),
    ),
    "patch2": (_vae(1, patch_size=2), _dit(4)),
    "blocks": (_vae(2), _dit(8)),
    # Every switch of the released config that the released golden numbers leave alone.
    "switches": (
        _vae(
            1,
            post_norm=False,
            qk_norm=False,
            qk_bias=True,
            clip_qkv=1.5,
            bias=False,
            layer_norm_affine=False,
            scaling_factor=0.8,
            shifting_factor=0.3,
        ),
        _dit(4, qk_bias=True, norm_eps=1e-3),
    ),
}
BASELINES = {"ar": True, "llada": False}  # by whether they are causal
FAMILIES = (*COLA, *BASELINES)


def _stage2(flow: FlowConfig | None = None, **changes: object) -> Stage2Config:
    # Weights near 1, so that every term shows in the gradients.
    plain = Stage2Config(entropy_weight=0.3, reference_weight=0.5, flow=flow or FlowConfig())
    return dataclasses.replace(plain, **changes)  # type: ignore[arg-type]


_STAGE1 = Stage1Config(kl_weight=0.2)
_ALL_AT_ONCE = FlowConfig(
    timestep_per="block", prompt_block_prob=0.5, history_dropout=0.4, noise_copies=2
)
_EVERYWHERE: dict[str, Settings] = {
    "stage1": _STAGE1,
    "stage2": _stage2(),
    "stage2_all_at_once": _stage2(_ALL_AT_ONCE, mask_documents=True),
}
_ONE_BY_ONE: dict[str, Settings] = {
    "stage1_documents": dataclasses.replace(_STAGE1, mask_documents=True),
    "stage1_fixed_log_snr": dataclasses.replace(_STAGE1, fixed_log_snr=1.5),
    "stage1_without_mask": dataclasses.replace(_STAGE1, mask_weight=0.0),
    "stage2_documents": _stage2(mask_documents=True),
    "stage2_prompt_blocks": _stage2(FlowConfig(prompt_block_prob=0.6)),
    "stage2_history_dropout": _stage2(FlowConfig(history_dropout=0.5)),
    "stage2_noise_copies": _stage2(FlowConfig(noise_copies=2)),
    "stage2_time_per_block": _stage2(FlowConfig(timestep_per="block")),
    "stage2_uniform_time": _stage2(FlowConfig(time_distribution="uniform")),
    "stage2_no_gradient_to_encoder": _stage2(FlowConfig(grad_to_encoder=False)),
    "stage2_fixed_log_snr": _stage2(fixed_log_snr=1.5),
    "stage2_fix": _stage2(vae_strategy=VAEStrategyConfig(mode="fix")),
}


def objectives(family: str) -> dict[str, Settings]:
    """The objectives whose losses and gradients are kept of a family, by name."""
    if family == "ar":
        return {
            "plain": AutoregressiveConfig(),
            "documents": AutoregressiveConfig(mask_documents=True),
        }
    if family == "llada":
        return {
            "plain": MaskedDiffusionConfig(),
            "documents": MaskedDiffusionConfig(mask_documents=True),
        }
    return _EVERYWHERE | (_ONE_BY_ONE if family == "base" else {})


def samplers(family: str) -> dict[str, SamplerConfig]:
    """The settings under which a family generates, by name. A batch holds fewer rows than there are
    prompts: rows take turns.
    """
    greedy = SamplerConfig(
        num_steps=8,
        guidance_scale=3.0,
        max_new_tokens=2 * block_tokens(family) + 2,
        eos_token_ids=(),
        repetition_penalty=1.5,
        batch_size=4,
        seed=3,
    )
    with_temperature = dataclasses.replace(
        greedy, temperature=0.8, top_k=12, top_p=0.9, eos_token_ids=None, seed=4
    )
    kinds = {"greedy": greedy, "temperature": with_temperature}
    # All ids have a share, those of negative logits too, which a penalty moves the other way.
    kinds["all_ids"] = dataclasses.replace(
        greedy, temperature=1.5, top_k=0, top_p=1.0, repetition_penalty=3.0, seed=5
    )
    if family == "base":
        kinds["heun"] = dataclasses.replace(greedy, solver="heun", guidance_interval=(0.2, 0.8))
        kinds["adams3"] = dataclasses.replace(greedy, solver="adams3", guidance_rescale=0.6)
    return kinds


def block_tokens(family: str) -> int:
    """Tokens of a block that the DiT generates; 8 for a baseline, which has none."""
    return COLA[family][0].patch_size * COLA[family][1].block_size if family in COLA else 8


def prompts(family: str) -> list[str | list[int]]:
    """A text, nothing, one token, and lengths just below, at and above whole blocks."""
    block = block_tokens(family)
    lengths = [0, 1, block - 1, block, block + 1, 2 * block + 3]
    return [
        "w7 w11 w20",
        *(_ids(f"{family}/prompt {length}", 1, length)[0].tolist() for length in lengths),
    ]


def checkpoint(family: str) -> AnyCheckpoint:
    """The family's networks with drawn weights, and a tokenizer of one word an id."""
    tokenizer, training = tiny_tokenizer(_VOCAB), {"seq_len": 64}
    networks: list[nn.Module]
    made: AnyCheckpoint
    if family in COLA:
        vae, dit = TextVAE(COLA[family][0]), BlockCausalDiT(COLA[family][1])
        networks, made = [vae, dit], ColaCheckpoint(vae, dit, tokenizer, training)
    else:
        transformer = Transformer(_TRANSFORMER, BASELINES[family])
        networks, made = (
            [transformer],
            (AutoregressiveCheckpoint if transformer.causal else MaskedDiffusionCheckpoint)(
                transformer, tokenizer, training
            ),
        )
    for network in networks:
        draw_weights(network.eval().requires_grad_(False), family)
    return made


def networks_of(made: AnyCheckpoint) -> dict[str, nn.Module]:
    """A checkpoint's networks, by name."""
    if isinstance(made, TransformerCheckpoint):
        return {"transformer": made.transformer}
    assert made.dit is not None
    return {"vae": made.vae, "dit": made.dit}


def draw_weights(network: nn.Module, family: str) -> None:
    """Normals everywhere, adaLN layers included, sized so that activations stay near 1 and no layer
    is idle.
    """
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            noise = _normals(f"{family}/{type(network).__name__}/{name}", 1, parameter.numel())[
                0
            ].view(parameter.shape)
            if parameter.ndim == 1:
                # Biases near 0; norm weights, built as ones, near 1.
                parameter.copy_((parameter == 1).float() + 0.3 * noise)
            else:
                parameter.copy_(_CALM.get(name, 1.0) * noise / parameter[0].numel() ** 0.5)


def inputs(family: str) -> dict[str, Tensor]:
    """One training-shaped batch, and what forward passes are fed: each network's own inputs, not
    another's outputs.
    """
    patch_size, channels = (
        (COLA[family][0].patch_size, COLA[family][0].latent_dim) if family in COLA else (1, 0)
    )
    seq = LATENTS * patch_size
    tokens = _ids(f"{family}/tokens", ROWS, seq)
    real = torch.arange(seq) < seq - torch.tensor([0, 5, 19])[:, None]
    documents = torch.tensor([[0, 0, 1], [0, 1, 2], [0, 0, 0]]).repeat_interleave(seq // 3, dim=1)
    batch = {
        "tokens": torch.where(real, tokens, PAD),
        "loss_mask": real,
        "document_ids": documents,
        "sample_index": torch.tensor([2, 2**33 + 5, 2**62]),
        "row_index": torch.arange(ROWS),
    }
    if family not in COLA:
        return batch
    drawn = {
        name: (
            _normals(f"{family}/{name}", ROWS, count * LATENTS * channels).view(
                ROWS, count * LATENTS, channels
            )
        )
        for name, count in (("latents", 1), ("eps", 1), ("noised", 2))
    }
    # Of two copies: the first block of one row and the last of another are partly clean.
    pinned = torch.zeros(ROWS, 2 * LATENTS, dtype=torch.bool)
    pinned[0, :3], pinned[1, -8:-6] = True, True
    sees_history = torch.ones(ROWS, 2 * LATENTS, dtype=torch.bool)
    sees_history[0, 8:16], sees_history[2, 32:40] = False, False
    times = _uniforms(f"{family}/t", 1, ROWS)[0]
    return {**batch, **drawn, "t": times, "pinned": pinned, "sees_history": sees_history}


def _normals(name: str, rows: int, count: int) -> Tensor:
    return normal(SEED, Purpose.WEIGHTS, _addresses(name, rows), count)


def _uniforms(name: str, rows: int, count: int) -> Tensor:
    return uniform(SEED, Purpose.WEIGHTS, _addresses(name, rows), count)


def _ids(name: str, rows: int, count: int) -> Tensor:
    """Ids of words only, never a special token."""
    special = len(TRAINED_SPECIAL_TOKENS)
    return special + (_uniforms(name, rows, count) * (_VOCAB - special)).long()


def _addresses(name: str, rows: int) -> Tensor:
    return (zlib.crc32(name.encode()) << 16) + torch.arange(rows)
