"""The two networks and the visible set once more, position by position in float64, written from the
format's description alone.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from torch import Tensor, nn

from cola_train.models.config import DiTConfig, TextVAEConfig

Array = np.ndarray
Weights = Mapping[str, Array]
Sees = Callable[[int, int], bool]


def weights_of(network: nn.Module) -> dict[str, Array]:
    return {name: tensor.detach().double().numpy() for name, tensor in network.state_dict().items()}


@dataclasses.dataclass(frozen=True)
class Place:
    """Where one position of a row stands."""

    block: int
    position: int  # for RoPE
    noised: bool = False
    document: int = 0
    sees_history: bool = True


def is_visible(query: Place, key: Place) -> bool:
    """The visible set: clean block b sees clean blocks <= b; noised block b sees clean blocks < b
    and itself; nothing else.
    """
    if query.document != key.document:
        return False
    if not query.noised:
        return not key.noised and key.block <= query.block
    if key.noised:
        return key.block == query.block
    return query.sees_history and key.block < query.block


def clean_row(length: int, block_size: int, documents: Sequence[int] | None = None) -> list[Place]:
    """A row of clean positions; positions restart at each document."""
    documents = documents or [0] * length
    return [
        Place(i // block_size, i - documents.index(documents[i]), False, documents[i])
        for i in range(length)
    ]


def packed_row(
    length: int,
    block_size: int,
    documents: Sequence[int] | None = None,
    sees_history: Sequence[bool] | None = None,
) -> list[Place]:
    """Every noised block, then the clean blocks but the last."""
    clean = clean_row(length, block_size, documents)
    hides = [False] * length if sees_history is None else [not shown for shown in sees_history]
    noised = [
        dataclasses.replace(place, noised=True, sees_history=not hides[i])
        for i, place in enumerate(clean)
    ]
    return noised + clean[: length - block_size]


def linear(weights: Weights, name: str, x: Array) -> Array:
    bias = weights.get(f"{name}.bias")
    return weights[f"{name}.weight"] @ x + (0 if bias is None else bias)


def layer_norm(x: Array, eps: float, weights: Weights | None = None, name: str = "") -> Array:
    centred = x - x.mean()
    normed = centred / math.sqrt((centred**2).mean() + eps)
    if weights is None or f"{name}.weight" not in weights:
        return normed
    return normed * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def gelu_tanh(x: Array) -> Array:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def rotate(x: Array, pairs: Sequence[tuple[int, int]], position: int, base: float) -> Array:
    """Turn the i-th pair of channels by position * base^(-i / number of pairs)."""
    out = x.copy()
    for i, (a, b) in enumerate(pairs):
        angle = position * base ** (-i / len(pairs))
        out[a] = x[a] * math.cos(angle) - x[b] * math.sin(angle)
        out[b] = x[b] * math.cos(angle) + x[a] * math.sin(angle)
    return out


def attend(
    queries: list[Array], keys: list[Array], values: list[Array], visible: Sees
) -> list[Array]:
    """One head's softmax attention, each query over the keys it sees."""
    out = []
    for i, query in enumerate(queries):
        seen = [j for j in range(len(keys)) if visible(i, j)]
        scores = np.array([query @ keys[j] / math.sqrt(len(query)) for j in seen])
        shares = np.exp(scores - scores.max())
        out.append(
            sum(share * values[j] for share, j in zip(shares / shares.sum(), seen, strict=True))
        )
    return out


def heads_attend(
    rows: list[tuple[Array, Array, Array]],
    num_heads: int,
    turn: Callable[[Array, int], Array],
    visible: Sees,
) -> list[Array]:
    """Multi-head attention of (q, k, v) rows; `turn` rotates a head's q or k at a position of the
    row.
    """
    heads = []
    for head in range(num_heads):
        parts = [[np.split(x, num_heads)[head] for x in row] for row in rows]
        queries = [turn(q, i) for i, (q, _, _) in enumerate(parts)]
        keys = [turn(k, i) for i, (_, k, _) in enumerate(parts)]
        heads.append(attend(queries, keys, [v for _, _, v in parts], visible))
    return [np.concatenate(per_head) for per_head in zip(*heads, strict=True)]


def _vae_block(
    config: TextVAEConfig, weights: Weights, name: str, row: list[Array], places: list[Place]
) -> list[Array]:
    head_dim, eps = config.dim // config.num_heads, config.layer_norm_eps
    pairs = [(i, i + head_dim // 2) for i in range(head_dim // 2)]

    def qkv(x: Array) -> tuple[Array, Array, Array]:
        projected = linear(weights, f"{name}.qkv_proj", x)
        if config.clip_qkv is not None:
            projected = np.clip(projected, -config.clip_qkv, config.clip_qkv)
        q, k, v = np.split(projected, 3)
        if config.qk_norm:
            q, k = (
                layer_norm(q, eps, weights, f"{name}.q_norm"),
                layer_norm(k, eps, weights, f"{name}.k_norm"),
            )
        return q, k, v

    def feed_forward(x: Array) -> Array:
        u, g = np.split(linear(weights, f"{name}.ffn_proj", x), 2)
        return linear(weights, f"{name}.ffn_out", silu(g) * u)

    normed = [layer_norm(x, eps, weights, f"{name}.norm_attn") for x in row]
    attended = heads_attend(
        [qkv(x) for x in (row if config.post_norm else normed)],
        config.num_heads,
        lambda x, i: rotate(x, pairs, places[i].position, config.rope_theta),
        lambda i, j: is_visible(places[i], places[j]),
    )
    out = []
    for x, n, a in zip(row, normed, attended, strict=True):
        x = (n if config.post_norm else x) + linear(weights, f"{name}.attn_out_proj", a)
        if config.post_norm:
            out.append(x + layer_norm(feed_forward(x), eps, weights, f"{name}.norm_ffn"))
        else:
            out.append(x + feed_forward(layer_norm(x, eps, weights, f"{name}.norm_ffn")))
    return out


def encode(
    config: TextVAEConfig,
    weights: Weights,
    tokens: Sequence[int],
    documents: Sequence[int] | None = None,
) -> tuple[Array, Array]:
    """Mean and log-variance of one row, scaled for the DiT; `documents` of each latent."""
    patch = config.patch_size
    embedded = weights["encoder.wte.weight"][list(tokens)]
    kernel, bias = weights["encoder.patch_embedder.weight"], weights["encoder.patch_embedder.bias"]
    starts = range(0, len(tokens), patch)
    row = [
        bias + sum(kernel[:, :, k] @ embedded[start + k] for k in range(patch)) for start in starts
    ]
    places = clean_row(len(row), config.block_size, documents)
    for layer in range(config.encoder_num_blocks):
        row = _vae_block(config, weights, f"encoder.blocks.{layer}", row, places)
    means, logvars = [], []
    for x in row:
        mean, logvar = np.split(linear(weights, "encoder.final_layer", x), 2)
        means.append(
            (layer_norm(mean, config.layer_norm_eps) - config.shifting_factor)
            * config.scaling_factor
        )
        logvars.append(np.clip(logvar, -30, 20) + 2 * math.log(abs(config.scaling_factor)))
    return np.stack(means), np.stack(logvars)


def decode(
    config: TextVAEConfig, weights: Weights, latents: Array, documents: Sequence[int] | None = None
) -> Array:
    """Logits of one row of scaled latents, patch_size tokens per latent."""
    row = [
        linear(weights, "decoder.in_layer", z / config.scaling_factor + config.shifting_factor)
        for z in latents
    ]
    places = clean_row(len(row), config.block_size, documents)
    for layer in range(config.decoder_num_blocks):
        row = _vae_block(config, weights, f"decoder.blocks.{layer}", row, places)
    logits = []
    for x in row:
        wide = linear(weights, "decoder.unpatch_layer", x)
        for k in range(config.patch_size):
            token = wide[k :: config.patch_size]
            token = layer_norm(token, config.layer_norm_eps, weights, "decoder.final_norm")
            logits.append(linear(weights, "decoder.final_layer", token))
    return np.stack(logits)


def velocity(
    config: DiTConfig, weights: Weights, latents: Array, times: Sequence[float], places: list[Place]
) -> Array:
    """The DiT over one row of latents, each with its own time in [0, 1] and place."""
    eps, width = config.norm_eps, config.heads * config.head_dim
    pairs = [(2 * i, 2 * i + 1) for i in range(config.rope_dim // 2)]
    sees_at = [[is_visible(query, key) for key in places] for query in places]

    def embed(t: float) -> Array:
        angles = [1000 * t * math.exp(-math.log(10000) * i / 128) for i in range(128)]
        e = np.array([math.sin(a) for a in angles] + [math.cos(a) for a in angles])
        e = silu(linear(weights, "emb_in.proj_in", e))
        return linear(weights, "emb_in.proj_out", silu(linear(weights, "emb_in.proj_hid", e)))

    embeddings = [embed(t) for t in times]

    def modulated(x: Array, ada: str, e: Array, norm: str = "") -> Array:
        shift, scale = np.split(linear(weights, f"{ada}.1", silu(e)), 2)
        return layer_norm(x, eps, weights, norm) * (1 + scale) + shift

    def qkv(name: str, x: Array) -> tuple[Array, Array, Array]:
        parts = linear(weights, f"{name}.proj_qkv", x).reshape(3, config.heads, config.head_dim)
        q, k = (
            np.stack([layer_norm(head, eps, weights, f"{name}.{norm}") for head in part])
            for part, norm in ((parts[0], "norm_q"), (parts[1], "norm_k"))
        )
        return q.reshape(width), k.reshape(width), parts[2].reshape(width)

    row = [linear(weights, "txt_in.proj", z) for z in latents]
    for layer in range(config.num_layers):
        name = f"blocks.{layer}"
        inputs = [
            modulated(x, f"{name}.ada.msa_in", e) for x, e in zip(row, embeddings, strict=True)
        ]
        attended = heads_attend(
            [qkv(f"{name}.msa", x) for x in inputs],
            config.heads,
            lambda x, i: rotate(x, pairs, places[i].position, 10000.0),
            lambda i, j: sees_at[i][j],
        )
        for i, e in enumerate(embeddings):
            gate = linear(weights, f"{name}.ada.msa_out.1", silu(e))
            row[i] = row[i] + gate * linear(weights, f"{name}.msa.proj_out", attended[i])
            hidden = linear(
                weights, f"{name}.mlp.proj_in", modulated(row[i], f"{name}.ada.mlp_in", e)
            )
            gate = linear(weights, f"{name}.ada.mlp_out.1", silu(e))
            row[i] = row[i] + gate * linear(weights, f"{name}.mlp.proj_out", gelu_tanh(hidden))
    return np.stack(
        [
            linear(weights, "txt_out.proj", modulated(x, "txt_out_ada.out_in", e, "txt_out_norm"))
            for x, e in zip(row, embeddings)
        ]
    )


def packed_velocity(
    config: DiTConfig,
    weights: Weights,
    z_t: Tensor,
    history: Tensor,
    times: Sequence[float],
    documents: Sequence[int] | None = None,
    sees_history: Sequence[bool] | None = None,
) -> Array:
    """The training pass over one row: the velocity of each noised latent."""
    num_clean = len(z_t) - config.block_size
    places = packed_row(len(z_t), config.block_size, documents, sees_history)
    latents = np.concatenate([z_t.double().numpy(), history[:num_clean].double().numpy()])
    return velocity(config, weights, latents, list(times) + [0.0] * num_clean, places)[: len(z_t)]
