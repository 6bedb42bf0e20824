"""Networks, tokenizers and batches small enough for loops in Python, with random weights
everywhere, adaLN layers included.
"""

import dataclasses
import json
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from cola_train.data.batch import Batch
from cola_train.data.tokenizer import TRAINED_SPECIAL_TOKENS, Tokenizer
from cola_train.families.cola.checkpoint import ColaCheckpoint
from cola_train.models.config import DiTConfig, TextVAEConfig
from cola_train.models.dit import BlockCausalDiT
from cola_train.models.text_vae import TextVAE

VAE_CONFIG = TextVAEConfig(
    vocab_size=29,
    encoder_num_blocks=2,
    decoder_num_blocks=2,
    dim=16,
    ffn_dim=24,
    latent_dim=4,
    num_heads=2,
    block_size=1,
)
DIT_CONFIG = DiTConfig(
    txt_in_channels=4,
    txt_out_channels=4,
    txt_dim=16,
    emb_dim=16,
    heads=2,
    head_dim=8,
    num_layers=2,
    rope_dim=6,
    block_size=4,
)
PAD = TRAINED_SPECIAL_TOKENS.index("<|pad|>")

Network = TypeVar("Network", bound=nn.Module)


def randomize(network: Network, seed: int) -> Network:
    """Fill every parameter with normals, sized so that activations stay near 1 and no layer is
    idle.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                # Biases near 0; norm weights, built as ones, near 1.
                parameter.copy_((parameter == 1).float() + 0.3 * noise)
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
    return network


def tiny_vae(seed: int = 1, **changes: Any) -> TextVAE:
    return randomize(TextVAE(dataclasses.replace(VAE_CONFIG, **changes)), seed)


def tiny_dit(seed: int = 2, **changes: Any) -> BlockCausalDiT:
    return randomize(BlockCausalDiT(dataclasses.replace(DIT_CONFIG, **changes)), seed)


def calm(network: Network) -> Network:
    """Shrink velocity or logits, so that sampling's many passes and its guidance do not blow
    rounding up past what is compared.
    """
    last = network.get_parameter(
        "txt_out.proj.weight"
        if isinstance(network, BlockCausalDiT)
        else "decoder.final_layer.weight"
    )
    with torch.no_grad():
        last.mul_(0.2)
    return network


def tiny_tokenizer(vocab_size: int = VAE_CONFIG.vocab_size) -> Tokenizer:
    """One id per word: the special tokens, then "w4", "w5", ..."""
    words = [
        *TRAINED_SPECIAL_TOKENS,
        *(f"w{number}" for number in range(len(TRAINED_SPECIAL_TOKENS), vocab_size)),
    ]
    special = {
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": number, "content": token, **special}
            for number, token in enumerate(TRAINED_SPECIAL_TOKENS)
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "WordLevel",
            "vocab": {word: number for number, word in enumerate(words)},
            "unk_token": words[-1],
        },
    }
    return Tokenizer(json.dumps(content).encode())


def tiny_checkpoint(vae: TextVAE, dit: BlockCausalDiT | None) -> ColaCheckpoint:
    for network in (vae, dit):
        if network is not None:
            network.eval().requires_grad_(False)
    return ColaCheckpoint(vae, dit, tiny_tokenizer(vae.config.vocab_size))


def random_tokens(
    rows: int, length: int, seed: int, vocab_size: int = VAE_CONFIG.vocab_size
) -> Tensor:
    """Ids of words only, never a special token."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(
        len(TRAINED_SPECIAL_TOKENS), vocab_size, (rows, length), generator=generator
    )


def random_latents(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_batch(
    tokens: Tensor, num_padding: list[int], documents: Tensor | None = None, first_index: int = 40
) -> Batch:
    """Rows that end in `num_padding` padding tokens each; sample indices count from
    `first_index`.
    """
    real = torch.arange(tokens.shape[1]) < tokens.shape[1] - torch.tensor(num_padding)[:, None]
    return Batch(
        tokens=torch.where(real, tokens, PAD),
        loss_mask=real,
        document_ids=torch.zeros_like(tokens) if documents is None else documents,
        sample_index=first_index + torch.arange(tokens.shape[0]),
        row_index=torch.arange(tokens.shape[0]),
    )


def rows_of(batch: Batch, rows: slice) -> Batch:
    return Batch(*(field[rows] for field in batch))
