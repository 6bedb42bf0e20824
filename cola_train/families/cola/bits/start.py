"""Initial values of a run that begins with bits: codes of the run's own rows, written networks."""

import functools
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from cola_train.data.prepared import PreparedData
from cola_train.families.cola.bits.codes import BitCodes
from cola_train.families.cola.bits.dit import BitDenoiser
from cola_train.families.cola.bits.vae import written_vae_value
from cola_train.families.cola.config import JointRunConfig
from cola_train.likelihood.token_tables import count_pairs, training_rows
from cola_train.models.initialize import dit_value, text_vae_value


def written_values(
    config: JointRunConfig, shapes: Mapping[str, torch.Size]
) -> Iterator[tuple[str, Tensor]]:
    """Both networks' tensors, and the reference encoder's where `shapes` has one."""
    log_snr, data = config.fixed_log_snr, PreparedData.open(config.data.path)
    assert log_snr is not None
    rows = training_rows(data, None)
    pairs = count_pairs(data, rows, config.vae.vocab_size, config.masks_documents)
    codes = BitCodes.of(pairs, config.vae.latent_dim)
    of_dit = {name[4:]: shape for name, shape in shapes.items() if name.startswith("dit.")}
    draw = functools.partial(dit_value, seed=config.seed)
    denoiser = BitDenoiser(config.dit, codes, log_snr, of_dit, draw)
    for name, shape in shapes.items():
        network, _, own = name.partition(".")
        if network == "dit":
            yield name, denoiser.value(own)
            continue
        own = f"encoder.{own}" if network == "reference_encoder" else own
        drawn = text_vae_value(own, shape, config.vae, config.seed)
        yield name, written_vae_value(own, drawn, config.vae, codes, log_snr)
