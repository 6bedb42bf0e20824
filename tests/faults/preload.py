"""What the commands of the suite need imported, in the process that forks them.

A plot takes as long as a small training: here its file holds nothing, and is written as ever.
"""

from typing import IO, Any

import lightning.pytorch.loops  # noqa: F401
import matplotlib.backends.backend_agg  # noqa: F401
import torch.distributed.checkpoint
import torch.distributed.tensor  # noqa: F401
from matplotlib.figure import Figure

import cola_train.evaluation.benchmarks.evaluate
import cola_train.evaluation.writing.sample
import cola_train.training.callbacks.plots
import cola_train.training.fit  # noqa: F401


def _nothing(figure: Figure, file: IO[bytes], **options: Any) -> None:
    file.write(b"a plot")


Figure.savefig = _nothing  # type: ignore[method-assign,assignment]
