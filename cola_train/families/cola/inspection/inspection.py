"""A checkpoint's latent space on held-out rows: what the VAE keeps, what the prior has learned."""

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cola_train.config.evaluation import InspectionConfig
from cola_train.config.settings import require
from cola_train.data.packing import VALIDATION
from cola_train.data.prepared import PreparedData
from cola_train.families.cola.inspection.latent_rows import latent_rows, likeliest_tokens
from cola_train.families.cola.inspection.nats_probe import Nats, NatsTally
from cola_train.families.cola.inspection.posterior_probes import (
    Drift,
    DriftTally,
    LatentMap,
    MapTally,
    PosteriorHealth,
    PosteriorTally,
)
from cola_train.families.cola.inspection.prior_probes import (
    FlowByPlace,
    FlowTally,
    HistoryUse,
    ReconstructionCurve,
    ReconstructionTally,
    TokenAccuracy,
    TokenAccuracyTally,
    prior_tokens,
)
from cola_train.families.cola.yardsticks.reading import read_statistics
from cola_train.likelihood.token_tables import BigramModel, count_pairs, training_rows
from cola_train.models.config import check_seq_len

if TYPE_CHECKING:
    from cola_train.families.cola.checkpoint import ColaCheckpoint


@dataclasses.dataclass(frozen=True)
class LatentInspection:
    """What `inspect_latents` finds; without a DiT a row is one block, and prior parts are None."""

    num_rows: int
    num_tokens: int
    block_size: int | None  # of the DiT, in latents
    posterior: PosteriorHealth
    reconstruction: ReconstructionCurve
    posterior_accuracy: TokenAccuracy
    majority_token_accuracy: float  # what always saying the commonest token would hit
    # what drawing tokens by their frequencies would hit; a prior draws, so this is its chance
    chance_token_accuracy: float
    map: LatentMap
    drift: Drift | None
    flow: FlowByPlace | None
    nats: Nats | None
    prior_accuracy: TokenAccuracy | None
    history: HistoryUse | None

    def metrics(self) -> dict[str, float]:
        """The single metrics, by names that stay; those of absent parts are left out."""
        health = self.posterior
        found = {
            "vae_log_snr": health.log_snr,
            "active_units": float(health.active_units),
            "active_units_share": health.active_units_share,
            "kl_nats_per_token": health.kl_nats_per_token,
            "information_nats_per_latent": sum(health.information_per_channel),
            "posterior_token_accuracy": self.posterior_accuracy.share,
            "majority_token_accuracy": self.majority_token_accuracy,
            "chance_token_accuracy": self.chance_token_accuracy,
            "noise_time_of_half_reconstruction": half_time(self.reconstruction),
        }
        if self.prior_accuracy is not None:
            found["prior_token_accuracy"] = self.prior_accuracy.share
            found["prior_token_accuracy_first_block"] = self.prior_accuracy.by_block[0]
        if self.flow is not None:
            found["flow_mse"] = self.flow.loss
            found["flow_gaussian_baseline"] = self.flow.bound
            found["flow_over_gaussian_baseline"] = self.flow.loss / self.flow.bound
            if self.flow.yardsticks is not None:
                found |= self.flow.yardsticks.metrics()
        if self.nats is not None:
            found |= self.nats.metrics()
        if self.history is not None:
            for name, value in dataclasses.asdict(self.history).items():
                found[f"history/{name}"] = value
        if self.drift is not None:
            for name in ("kl_nats_per_token", "rms_change_of_means", "cosine_of_means"):
                found[f"reference_{name}"] = getattr(self.drift, name)
        return found

    def tables(self) -> list[str]:
        """Nats beside tables'; empty without a prior."""
        return [] if self.nats is None else [self.nats.table()]

    def remarks(self) -> list[str]:
        """What the yardsticks say of the prior; empty without one."""
        if self.flow is None:
            return []
        if self.flow.yardsticks is None:
            return [
                "No n-gram yardsticks: a latent holds several tokens, whose tuples have too many "
                "codes; beside the flow loss stands the Gaussian baseline alone, beside the bound "
                "in nats what tables of single tokens find."
            ]
        return self.flow.yardsticks.remarks()

    def to_json(self) -> dict[str, Any]:
        found = {"figures": _finite(self.metrics()), "remarks": self.remarks()}
        return {**found, **_finite(dataclasses.asdict(self))}

    def draw(self, title: str, png: Path, svg: Path) -> None:
        # matplotlib takes a second to import
        from cola_train.families.cola.inspection.figure import draw_inspection

        draw_inspection(self, title, png, svg)


def half_time(curve: ReconstructionCurve) -> float:
    """The noise time at which the accuracy of noised latents is half of that at t = 0.

    Linear between grid points; 1 if it never falls so far.
    """
    half = curve.noised[0] / 2
    points = zip(curve.times, curve.noised, strict=True)
    for (t, above), (t_next, below) in itertools.pairwise(points):
        if below <= half < above:
            return t + (above - half) / (above - below) * (t_next - t)
    return 1.0


@torch.inference_mode()
def inspect_latents(
    checkpoint: "ColaCheckpoint",
    data: PreparedData,
    config: InspectionConfig,
    reference: "ColaCheckpoint | None" = None,
) -> Iterator[LatentInspection | None]:
    """Inspect latents of the first held-out rows; None after each batch, then what was found.

    Draws are always the same. `reference` is on the checkpoint's device.

    Raises:
        UserError: another tokenizer than the data's; rows that do not fill blocks; fewer than two
            held-out rows; a reference whose latents are not comparable.
    """
    _check(checkpoint, data, reference)
    vae, dit, seq_len = checkpoint.vae, checkpoint.dit, data.manifest.seq_len
    patch_size = vae.config.patch_size
    block_tokens = seq_len if dit is None else patch_size * dit.config.block_size
    uses: Counter[int] = Counter()  # of each token
    posterior = PosteriorTally(vae.config.latent_dim)
    latent_map = MapTally(config.map_latents, checkpoint.tokenizer, patch_size)
    reconstruction = ReconstructionTally(vae, dit, config.num_times)
    posterior_accuracy = TokenAccuracyTally(seq_len, block_tokens)
    prior_accuracy = TokenAccuracyTally(seq_len, block_tokens)
    drift = None if reference is None else DriftTally(reference.vae.encoder)
    flow = nats = None
    if dit is not None:
        known, codebook = None, None
        masks, most = checkpoint.masks_documents, config.yardstick_rows
        if patch_size == 1:
            known = read_statistics(vae, data, most, config.batch_size, masks)
            codebook, bigram = known.codebook, known.bigram
        else:
            counted = training_rows(data, most)
            pairs = count_pairs(data, counted, vae.config.vocab_size, masks)
            bigram = BigramModel.of(pairs, checkpoint.device, torch.float32)
        flow = FlowTally(dit, seq_len // patch_size, config.num_time_bins, config.seed, known)
        nats = NatsTally(
            vae, dit, checkpoint.tokenizer, bigram, codebook, config.elbo_draws, config.seed
        )
    for rows in latent_rows(vae, data, config, checkpoint.masks_documents):
        uses.update(rows.batch.tokens[rows.batch.loss_mask].tolist())
        for tally in (posterior, latent_map, reconstruction, drift, flow, nats):
            if tally is not None:
                tally.add(rows)
        decoded = likeliest_tokens(vae, vae.decoder(rows.z_0, rows.document))
        posterior_accuracy.add(rows, decoded)
        if dit is not None:
            decoded = prior_tokens(vae, dit, rows, config.num_steps, config.seed)
            prior_accuracy.add(rows, decoded)
        yield None
    shares = [count / uses.total() for count in uses.values()]
    yield LatentInspection(
        num_rows=min(config.num_rows, data.num_rows(VALIDATION)),
        num_tokens=uses.total(),
        block_size=None if dit is None else dit.config.block_size,
        posterior=posterior.result(),
        reconstruction=reconstruction.result(),
        posterior_accuracy=posterior_accuracy.result(),
        majority_token_accuracy=max(shares),
        chance_token_accuracy=sum(share**2 for share in shares),
        map=latent_map.result(),
        drift=None if drift is None else drift.result(),
        flow=None if flow is None else flow.result(),
        nats=None if nats is None else nats.result(),
        prior_accuracy=None if dit is None else prior_accuracy.result(),
        history=None if flow is None else flow.history_use(),
    )


def _check(
    checkpoint: "ColaCheckpoint", data: PreparedData, reference: "ColaCheckpoint | None"
) -> None:
    config = checkpoint.vae.config
    require(
        checkpoint.tokenizer.sha256 == data.tokenizer.sha256,
        f"The data in {data.folder} was prepared with another tokenizer (sha256 "
        f"{data.tokenizer.sha256}) than the checkpoint's ({checkpoint.tokenizer.sha256}); give "
        "data prepared with the checkpoint's.",
    )
    block_size = config.block_size if checkpoint.dit is None else checkpoint.dit.config.block_size
    check_seq_len(data.manifest.seq_len, config.patch_size, block_size)
    found = data.num_rows(VALIDATION)
    require(
        found >= 2,
        f"An inspection needs at least 2 held-out rows; {data.folder} has {found}. Prepare data "
        "with a larger held_out_share.",
    )
    if reference is not None:
        ours, theirs = (
            (c.vocab_size, c.latent_dim, c.patch_size) for c in (config, reference.vae.config)
        )
        require(
            ours == theirs and reference.tokenizer.sha256 == checkpoint.tokenizer.sha256,
            "The reference must have the checkpoint's tokenizer, and its vocab_size, latent_dim "
            f"and patch_size {ours}, not {theirs}; give the stage-1 checkpoint that it started "
            "from.",
        )


def _finite(value: Any) -> Any:
    # JSON knows neither NaN nor infinity.
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
