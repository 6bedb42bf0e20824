"""Cola DLM in memory, of stage 1 or 2, and what it can be asked."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cola_train.config.evaluation import InspectionConfig, LikelihoodConfig
from cola_train.config.sampling import SamplerConfig
from cola_train.config.settings import UserError
from cola_train.data.prepared import PreparedData
from cola_train.data.tokenizer import Tokenizer
from cola_train.families.checkpoint import Checkpoint, Inspection, SolverQuality, read_tokenizer
from cola_train.families.cola.blocks import BlockGeneration
from cola_train.families.cola.flops import generation_work
from cola_train.families.cola.format import (
    VAE_FORMAT,
    dit_format_in,
    find_root,
    vae_weights,
    write_checkpoint,
)
from cola_train.families.cola.likelihood import LatentWeights
from cola_train.families.cola.prefix import Prefix
from cola_train.families.family import TrainedRun
from cola_train.flops.work import Parts
from cola_train.likelihood.rows import ScoredRow
from cola_train.models.config import DiTConfig, check_pair
from cola_train.models.dit import BlockCausalDiT
from cola_train.models.text_vae import TextVAE
from cola_train.sampling.stream import Noise, Text, check_ids, stream
from cola_train.tensor_files import DEFAULT_MAX_SHARD_BYTES, Below


@dataclasses.dataclass
class ColaCheckpoint(Checkpoint):
    """A VAE, a DiT (absent after stage 1) and the tokenizer, in fp32, ready for inference."""

    vae: TextVAE
    dit: BlockCausalDiT | None
    tokenizer: Tokenizer
    # what `cola-train` wrote of the run; {} if released
    training: dict[str, Any] = dataclasses.field(default_factory=dict)

    likelihood_kind = "ELBO"  # latents are drawn for a whole text
    solver_settings = frozenset(
        {
            "num_steps",
            "solver",
            "guidance_scale",
            "guidance_interval",
            "guidance_rescale",
            "noise_scale",
            "history",
            "released_rounding",
        }
    )

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device = "cpu") -> "ColaCheckpoint":
        """Read the released layout, as `Family.load`; of a run folder its `hf` export."""
        root = find_root(folder)
        vae, dit = VAE_FORMAT.load(root), None
        stored = dit_format_in(root)
        if stored is not None:
            check_pair(vae.config, stored.read_config(root))
            dit = stored.load(root)
        held = read_tokenizer(root, vae.config.vocab_size, "VAE")
        return cls(vae, dit, *held).for_inference(device)

    def for_inference(self, device: str | torch.device) -> "ColaCheckpoint":
        """This checkpoint, its networks moved to `device`, in eval mode and without gradient."""
        for network in self.networks.values():
            network.to(device).eval().requires_grad_(False)
        return self

    def save(
        self,
        folder: str | Path,
        *,
        replace: bool = False,
        max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
    ) -> None:
        write_checkpoint(
            Path(folder),
            (self.vae.config, self.vae.state_dict()),
            None if self.dit is None else (self.dit.config, self.dit.state_dict()),
            self.tokenizer,
            self.training,
            replace=replace,
            max_shard_bytes=max_shard_bytes,
        )

    @property
    def family(self) -> str:
        """The stage: a checkpoint of stage 1 has no DiT."""
        return "vae" if self.dit is None else "joint"

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        return {"vae": self.vae} if self.dit is None else {"vae": self.vae, "dit": self.dit}

    @property
    def vocab_size(self) -> int:
        return self.vae.config.vocab_size

    def prior(self, purpose: str) -> BlockCausalDiT:
        """The DiT.

        Raises:
            UserError: a checkpoint of stage 1; the message says that `purpose` needs one.
        """
        if self.dit is None:
            raise UserError(
                f"This checkpoint holds a VAE only; {purpose} needs the DiT of stage 2 (cola-train "
                "joint)."
            )
        return self.dit

    def texts(
        self,
        prompts: Sequence[Sequence[int]],
        addresses: Sequence[int],
        config: SamplerConfig,
        stops: frozenset[int],
        noise: Noise | None = None,
    ) -> Iterator[Text]:
        """`Checkpoint.texts`; a block's `noise` is (block_size, latent_dim)."""
        pad = self.tokenizer.pad_token_id if config.pad_token_id is None else config.pad_token_id
        dit = self.for_passes(self.prior("sampling"), config)
        vae = self.for_passes(self.vae, config)
        check_ids([pad], self.vocab_size, "pad_token_id")
        prefixes = [self._prefix(len(prompt)) for prompt in prompts]
        new = config.max_new_tokens
        capacity = max((x.history_blocks + x.generated_blocks(new) for x in prefixes), default=0)

        def begin(some: Sequence[Sequence[int]], indices: Sequence[int]) -> BlockGeneration:
            return BlockGeneration(vae, dit, some, indices, config, pad, noise, capacity)

        return stream(begin, prompts, addresses, config, stops)

    def latents_of(self, prompt: Sequence[int], text: Text, num_tokens: int) -> Tensor | None:
        """Clean, normalized latents, without the prompt's own."""
        return torch.cat(text.latents)[: self._prefix(len(prompt)).generated_latents(num_tokens)]

    def tokens_a_pass(self, prompt_tokens: int, new_tokens: int) -> tuple[int, int]:
        prefix = self._prefix(prompt_tokens)
        return prefix.block_tokens - prefix.known_tokens, prefix.block_tokens

    def _prefix(self, num_tokens: int) -> Prefix:
        block_size = self.prior("sampling").config.block_size
        return Prefix(num_tokens, self.vae.config.patch_size, block_size)

    def generation_work(self, config: SamplerConfig, prompt_tokens: int, batch: int) -> Parts:
        dit = self.prior("sampling").config
        return generation_work(self.vae.config, dit, config, prompt_tokens, batch)

    def compare_solvers(
        self,
        prompts: Sequence[Sequence[int]],
        config: SamplerConfig,
        solvers: Sequence[str],
        steps: Sequence[int],
        reference_steps: int,
    ) -> Sequence[SolverQuality]:
        from cola_train.families.cola.solver_quality import compare_solvers

        return compare_solvers(self, prompts, config, solvers, steps, reference_steps)

    def describe_likelihood(self, config: LikelihoodConfig) -> str:
        if config.method == "bound":
            return (
                f"upper bounds by denoising, by {config.num_samples} draws of latents and noise "
                "levels for each row"
            )
        tolerance = f"{config.num_steps} steps"
        if config.solver == "dopri5":
            tolerance = f"rtol {config.rtol}, atol {config.atol}"
        return (
            f"estimates, by {config.num_samples} draws of the latents for each row; the prior's "
            f"ODE by {config.solver}, {tolerance}; {config.divergence} divergence"
        )

    def likelihood(self, rows: Sequence[ScoredRow], config: LikelihoodConfig) -> LatentWeights:
        return LatentWeights(self.vae, self.prior("likelihood"), self.tokenizer, rows, config)

    def inspect(
        self, data: PreparedData, config: InspectionConfig, reference: Checkpoint | None = None
    ) -> Iterator[Inspection | None]:
        """`Checkpoint.inspect`; `reference` is usually the stage-1 checkpoint."""
        from cola_train.families.cola.inspection.inspection import inspect_latents

        if reference is not None and not isinstance(reference, ColaCheckpoint):
            raise UserError(
                "The reference has no encoder; give the stage-1 checkpoint that this one started "
                "from."
            )
        return inspect_latents(self, data, config, reference)


def in_memory(
    run: TrainedRun[Any], dit_config: DiTConfig | None, device: str | torch.device
) -> ColaCheckpoint:
    """The checkpoint of a run; without a DiT where `dit_config` is None."""
    vae, dit = TextVAE(run.config.vae), None
    vae.load_state_dict(dict(vae_weights(run.config, run.weights)))
    if dit_config is not None:
        dit = BlockCausalDiT(dit_config)
        dit.load_state_dict(dict(Below(run.weights, "dit.")))
    return ColaCheckpoint(vae, dit, run.tokenizer, dict(run.training)).for_inference(device)
