"""torch.compile of blocks, with static shapes: a run's rows and micro-batches have one size."""

import os
import shutil

from torch import nn

from cola_train.config.settings import require
from cola_train.models.blocks import blocks_of

# Each pair of a block's class and what it is called with is compiled once: with and without
# gradients (training, reference encoder, validation), clean rows with masked ones or alone, the
# last block of the DiT. All blocks of a network share the result.
_MOST_KINDS = 64


def check_compiler(compiles: bool, on_gpu: bool) -> None:
    """Refuse to compile where torch would fail at the first step, for want of a C++ compiler.

    Raises:
        UserError: there is none. A GPU's kernels need none.
    """
    named = os.environ.get("CXX", "g++")
    require(
        not compiles or on_gpu or shutil.which(named) is not None,
        f"trainer.compile=true needs a C++ compiler on a CPU, and there is no {named} (CXX, g++ "
        "without it): install one, or set trainer.compile=false.",
    )


def compile_blocks(objective: nn.Module, backend: str = "inductor") -> None:
    """Compile every block's forward and backward at its first call.

    After activation checkpointing, before sharding. Blocks and not the whole: what FSDP2 does
    between blocks cannot be part of a graph.
    """
    # not above: this module also refuses, before anything is trained, and the compiler is large
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MOST_KINDS)
    for block in blocks_of(objective):
        block.forward = torch.compile(block.forward, backend=backend, dynamic=False, fullgraph=True)
