"""What fewer steps and other solvers cost in quality.

Blocks are compared to those of a very fine solution from the same noise.
"""

import dataclasses
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, get_args

import torch

from cola_train.config.sampling import SamplerConfig, Solver
from cola_train.config.settings import nearest, require
from cola_train.console import progress_bar
from cola_train.families.checkpoint import SolverQuality
from cola_train.families.cola.blocks import BlockGeneration, GeneratedBlock
from cola_train.families.cola.transport import BlockTransport
from cola_train.sampling.precision import computes_in_bf16
from cola_train.solvers import network_calls

if TYPE_CHECKING:
    from cola_train.families.cola.checkpoint import ColaCheckpoint

REFERENCE_SOLVER: Solver = "heun"


@torch.inference_mode()
def compare_solvers(
    checkpoint: "ColaCheckpoint",
    prompts: Sequence[Sequence[int]],
    config: SamplerConfig,
    solvers: Sequence[str],
    steps: Sequence[int],
    reference_steps: int,
) -> list[SolverQuality]:
    """Compare solvers and numbers of steps on a trained checkpoint.

    Each block is generated from the same noise and after the same history, which is the
    reference's: `reference_steps` steps of Heun's method. Known latents and prompt tokens do not
    count. Tokens are greedy, without a repetition penalty; `config.solver` and `.num_steps` play no
    part. There is a row for each pair, by solver, then by steps.

    Raises:
        UserError: no prompts, a solver that there is not, or a checkpoint without a DiT.
    """
    known: dict[str, Solver] = {solver: solver for solver in get_args(Solver)}
    for solver in solvers:
        require(solver in known, f"There is no solver '{solver}'; {nearest(solver, known)}")
    require(len(prompts) > 0, "There are no prompts to continue; give at least one.")
    device, prior = checkpoint.device, checkpoint.prior("sampling")
    vae, dit = checkpoint.for_passes(checkpoint.vae, config), checkpoint.for_passes(prior, config)
    greedy = dataclasses.replace(config, temperature=0.0, repetition_penalty=1.0, compile=False)
    reference = dataclasses.replace(greedy, solver=REFERENCE_SOLVER, num_steps=reference_steps)
    num_batches = -(-len(prompts) // config.batch_size)
    with (
        progress_bar("quality", "batch", num_batches) as bar,
        torch.autocast(device.type, torch.bfloat16, enabled=computes_in_bf16(config, device)),
    ):
        settings = [
            dataclasses.replace(greedy, solver=known[solver], num_steps=count)
            for solver in solvers
            for count in steps
        ]
        candidates = [_Candidate(BlockTransport(dit, changed)) for changed in settings]
        for start in range(0, len(prompts), config.batch_size):
            indices = range(start, min(start + config.batch_size, len(prompts)))
            batch = [prompts[index] for index in indices]
            generation = BlockGeneration(
                vae, dit, batch, indices, reference, checkpoint.tokenizer.pad_token_id, None
            )
            for candidate in candidates:
                candidate.texts += [[] for _ in batch]
            for _ in range(generation.num_blocks):
                # Not in the time of the first candidate.
                generation.catch_up()
                counted = generation.generated
                blocks = [candidate.trial(generation) for candidate in candidates]
                wanted = generation.next_block()
                for candidate, block in zip(candidates, blocks, strict=True):
                    candidate.add(block, wanted, counted)
            bar.update(1)
    return [candidate.quality(len(prompts)) for candidate in candidates]


@dataclasses.dataclass
class _Candidate:
    """A solver with a number of steps, and how far its blocks are from the reference's, summed."""

    transport: BlockTransport
    squares: float = 0.0
    values: int = 0
    equal: int = 0
    tokens: int = 0
    seconds: float = 0.0
    texts: list[list[int]] = dataclasses.field(default_factory=list)  # ids; the last are a batch's

    def trial(self, generation: BlockGeneration) -> GeneratedBlock:
        """The next block, timed."""
        started = time.process_time()
        block = generation.trial(self.transport)
        self.seconds += time.process_time() - started
        return block

    def add(self, block: GeneratedBlock, wanted: GeneratedBlock, counted: torch.Tensor) -> None:
        """Add a block, (batch, latents) of which are `counted`."""
        difference = (block.latents - wanted.latents)[counted].double()
        self.squares += float(difference.square().sum())
        self.values += difference.numel()
        counted = counted.repeat_interleave(wanted.tokens.shape[1] // counted.shape[1], dim=1)
        self.equal += int((block.tokens == wanted.tokens)[counted].sum())
        self.tokens += int(counted.sum())
        for text, ids, own in zip(self.texts[-len(counted) :], block.tokens, counted, strict=True):
            text += ids[own].tolist()

    def quality(self, num_prompts: int) -> SolverQuality:
        config = self.transport.config
        grams = [gram for ids in self.texts for gram in zip(ids, ids[1:], ids[2:], ids[3:])]
        return SolverQuality(
            solver=config.solver,
            num_steps=config.num_steps,
            network_calls=len(network_calls(config.solver, config.num_steps)),
            latent_rms_error=float((self.squares / self.values) ** 0.5),
            token_agreement=self.equal / self.tokens,
            cpu_seconds_per_sample=self.seconds / num_prompts,
            distinct_4gram_share=len(set(grams)) / max(1, len(grams)),
        )
