"""A trained model in memory, of any family: what sampling, likelihood and evaluation ask of it."""

import abc
import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar, cast, runtime_checkable

import torch
import xxhash
from torch import Tensor, nn

from cola_train.config.evaluation import InspectionConfig, LikelihoodConfig
from cola_train.config.sampling import SamplerConfig
from cola_train.config.settings import UserError, require
from cola_train.data.prepared import PreparedData
from cola_train.data.special_tokens import NAMES_FILE
from cola_train.data.tokenizer import Tokenizer
from cola_train.export_files import TRAINING, read_json, refuse_altered
from cola_train.families.registry import load_checkpoint
from cola_train.flops.work import Parts
from cola_train.likelihood.rows import Estimator, LikelihoodKind, ScoredRow
from cola_train.sampling.precision import computes_in_bf16, ready_for_passes
from cola_train.sampling.stream import Noise, Text
from cola_train.tensor_files import DEFAULT_MAX_SHARD_BYTES

Network = TypeVar("Network", bound=nn.Module)


@runtime_checkable
class Inspection(Protocol):
    """What `Checkpoint.inspect` finds: numbers to log, all of it for a file, a page of plots."""

    @property
    def num_rows(self) -> int:
        """Rows that were looked at."""

    @property
    def num_tokens(self) -> int:
        """Their tokens."""

    def metrics(self) -> dict[str, float]:
        """The single numbers, by names that stay."""

    def tables(self) -> list[str]:
        """Numbers that are read side by side, for people; each of several lines."""

    def remarks(self) -> list[str]:
        """What they mean, a sentence each, for people."""

    def to_json(self) -> dict[str, Any]:
        """Everything; null where there is no number."""

    def draw(self, title: str, png: Path, svg: Path) -> None:
        """The page."""


@dataclasses.dataclass(frozen=True)
class SolverQuality:
    """One solver with one number of steps, over all generated blocks of all prompts.

    Attributes:
        solver: as of SamplerConfig.
        num_steps: steps a block.
        network_calls: passes of the network a block; where guidance applies each runs both
            branches.
        latent_rms_error: root mean square difference from the reference's latents, over positions
            and channels.
        token_agreement: share of greedy tokens that are the reference's.
        cpu_seconds_per_sample: CPU time of transporting and decoding all blocks of a prompt.
        distinct_4gram_share: of the 4-grams of its tokens, text by text, the different ones.
    """

    solver: str
    num_steps: int
    network_calls: int
    latent_rms_error: float
    token_agreement: float
    cpu_seconds_per_sample: float
    distinct_4gram_share: float


class Checkpoint(abc.ABC):
    """Networks and their tokenizer, in fp32, ready for inference.

    Attributes:
        tokenizer: of its token ids.
        training: what `cola-train` wrote of the run; {} of a checkpoint that was not trained here.
        solver_settings: the settings of SamplerConfig, besides those of token choice, that its text
            depends on.
    """

    tokenizer: Tokenizer
    training: dict[str, Any]
    solver_settings: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device = "cpu") -> "Checkpoint":
        """A checkpoint of any family; a run folder stands for its export.

        Raises:
            UserError: there is none in this folder, or it is incomplete, corrupt or not supported.
        """
        return load_checkpoint(folder, device)

    @abc.abstractmethod
    def save(
        self,
        folder: str | Path,
        *,
        replace: bool = False,
        max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
    ) -> None:
        """Write the family's layout, atomically; `replace` allows an existing folder."""

    @property
    @abc.abstractmethod
    def family(self) -> str:
        """The family's name."""

    @property
    @abc.abstractmethod
    def networks(self) -> Mapping[str, nn.Module]:
        """By name, such as "vae"."""

    @property
    @abc.abstractmethod
    def vocab_size(self) -> int:
        """Number of token ids that the networks know; the tokenizer may have fewer."""

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return next(next(iter(self.networks.values())).parameters()).device

    @property
    def trained_seq_len(self) -> int | None:
        """Tokens in a row of training, where the checkpoint says."""
        seq_len = self.training.get("seq_len")
        return seq_len if isinstance(seq_len, int) else None

    @property
    def masks_documents(self) -> bool:
        """Whether training kept the documents of a row apart; False if unknown."""
        return self.training.get("mask_documents") is True

    def identity(self) -> dict[str, Any]:
        """All of it that decides what it answers, as JSON: what results of it can be told by."""
        return {
            "checkpoint": {
                "family": self.family,
                "weights_xxh3": _weights_digest(self.networks.values()),
                **self.training,
            },
            "tokenizer_sha256": self.tokenizer.sha256,
            # On a GPU the networks run in bf16.
            "device": self.device.type,
        }

    @functools.cached_property
    def _casts(self) -> dict[tuple[nn.Module, torch.device], nn.Module]:
        return {}

    def for_passes(self, network: Network, config: SamplerConfig) -> Network:
        """A network as sampling uses it: in bf16 a copy, made once and kept with the checkpoint.

        The copy does not follow the weights: whoever changes these in place makes another
        checkpoint of them.
        """
        device = self.device
        if not computes_in_bf16(config, device):
            return network
        if (network, device) not in self._casts:
            self._casts[network, device] = ready_for_passes(network, config, device)
        return cast(Network, self._casts[network, device])

    @abc.abstractmethod
    def texts(
        self,
        prompts: Sequence[Sequence[int]],
        addresses: Sequence[int],
        config: SamplerConfig,
        stops: frozenset[int],
        noise: Noise | None = None,
    ) -> Iterator[Text]:
        """Each prompt's continuation: max_new_tokens and the rest of their block, or to a stop.

        Args:
            prompts: ids of each; may be empty.
            addresses: of each prompt's random draws, in [0, 2^63).
            config: the sampler's settings.
            stops: ids that end a text.
            noise: initial noise in place of the seeded draws, for families that begin with noise.

        Raises:
            UserError: a checkpoint that writes no text, or settings that its family has not.
        """

    def latents_of(self, prompt: Sequence[int], text: Text, num_tokens: int) -> Tensor | None:
        """Latents, (positions, channels), of a text's first `num_tokens`; None without latents."""
        return None

    @abc.abstractmethod
    def tokens_a_pass(self, prompt_tokens: int, new_tokens: int) -> tuple[int, int]:
        """New tokens of the first pass after a prompt, and of each later: a block, one, or all."""

    @abc.abstractmethod
    def generation_work(self, config: SamplerConfig, prompt_tokens: int, batch: int) -> Parts:
        """FLOPs, by part, of continuing `batch` prompts by max_new_tokens, without early stops.

        Useful (`model`) leaves out hidden pairs, and last hidden states that nobody reads.
        """

    def compare_solvers(
        self,
        prompts: Sequence[Sequence[int]],
        config: SamplerConfig,
        solvers: Sequence[str],
        steps: Sequence[int],
        reference_steps: int,
    ) -> Sequence[SolverQuality]:
        """How near each solver comes, with so many steps, to a reference of `reference_steps`.

        Raises:
            UserError: a family that solves nothing, no prompts, or a solver that there is not.
        """
        raise UserError(
            f"A checkpoint of `cola-train {self.family}` has no solver whose steps could be "
            "compared; give one of stage 2."
        )

    @property
    @abc.abstractmethod
    def likelihood_kind(self) -> LikelihoodKind:
        """What `likelihood` finds; an ELBO's log p of a continuation is a difference of texts'."""

    @abc.abstractmethod
    def describe_likelihood(self, config: LikelihoodConfig) -> str:
        """How it is found, for people."""

    @abc.abstractmethod
    def likelihood(self, rows: Sequence[ScoredRow], config: LikelihoodConfig) -> Estimator:
        """What finds log p of `rows`, or a bound of it; for an ELBO no row has given tokens.

        Raises:
            UserError: a checkpoint without a likelihood.
        """

    def inspect(
        self, data: PreparedData, config: InspectionConfig, reference: "Checkpoint | None" = None
    ) -> Iterator[Inspection | None]:
        """Look into latents of held-out rows: None after each batch, then what was found.

        `data` is prepared with the checkpoint's tokenizer; drift is measured from the encoder of
        `reference`.

        Raises:
            UserError: a family without latents, or data or a reference that do not fit.
        """
        raise UserError(
            f"A checkpoint of `cola-train {self.family}` has no latents to inspect; give one that "
            "has, such as Cola DLM's."
        )


def _weights_digest(networks: Iterable[nn.Module]) -> str:
    """A digest of names, shapes and values, however they are cut into files."""
    digest = xxhash.xxh3_128()
    for network in networks:
        for name, tensor in network.state_dict().items():
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def read_tokenizer(root: Path, vocab_size: int, network: str) -> tuple[Tokenizer, dict[str, Any]]:
    """A checkpoint's tokenizer, beside a network of `vocab_size` ids, and its `training`."""
    refuse_altered(root, [TRAINING, NAMES_FILE, "tokenizer.json"])
    tokenizer = Tokenizer.load(root / "tokenizer.json")
    require(
        tokenizer.vocab_size <= vocab_size,
        f"{root}: the tokenizer has {tokenizer.vocab_size} ids, the {network} only {vocab_size}; "
        "put the tokenizer.json there that the checkpoint was trained with.",
    )
    return tokenizer, read_json(root / TRAINING)[0] if (root / TRAINING).is_file() else {}
