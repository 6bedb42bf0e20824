"""config.json: what is read, what is refused."""

import pytest

from cola_train.config.settings import UserError
from cola_train.models.config import DiTConfig, TextVAEConfig


def test_released_fields_round_trip_and_library_fields_are_ignored() -> None:
    config = TextVAEConfig(dim=64, num_heads=2, block_size=1)
    read = TextVAEConfig.from_json(
        {**config.to_json(), "model_type": "cola_text_vae", "transformers_version": "5"}, "here"
    )
    assert read == config


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"latent_dimm": 16}, "here: unknown field 'latent_dimm'; did you mean 'latent_dim'"),
        ({"dim": "wide"}, "here: field 'dim' must be of type .*int.*, not 'wide'"),
        ({"block_causal": False}, "block_causal = False is not supported: .*across samples"),
        ({"shared_heads_kv": 3}, "shared_heads_kv = 3 is not supported"),
        ({"dropout": 0.1}, "dropout = 0.1 is not supported"),
        ({"act": "gelu"}, "act = 'gelu' is not supported.*Use 'swiglu'"),
        ({"dim": 100}, r"dim \(100\) must be a multiple of 2 x num_heads \(12\)"),
    ],
)
def test_refused_vae_fields(fields: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TextVAEConfig.from_json(fields, "here")


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"patch_size": 2}, "patch_size = 2 is not supported"),
        ({"emb_dim": 64}, "emb_dim = 64 is not supported"),
        ({"rope_dim": 7}, "rope_dim must be even"),
        ({"txt_out_channels": 8}, "txt_out_channels = 8 is not supported"),
    ],
)
def test_refused_dit_fields(fields: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        DiTConfig.from_json(fields, "here")
