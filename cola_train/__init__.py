"""Train Cola DLM, a continuous latent diffusion language model.

The names here are the stable ones (docs/python.md); modules below may move. Each is imported at
its first use: `import cola_train` imports no torch.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cola_train.config.data import CorpusConfig, DataConfig, PrepareConfig, TokenizerTrainConfig
    from cola_train.config.load import load_config
    from cola_train.config.loop import TrainerConfig
    from cola_train.config.optim import OptimConfig
    from cola_train.config.run import RunConfig
    from cola_train.config.sampling import SamplerConfig
    from cola_train.config.settings import UserError
    from cola_train.data.batch import Batch, PackedRows
    from cola_train.data.prepare import prepare
    from cola_train.data.prepared import PreparedData
    from cola_train.data.tokenizer import train_tokenizer
    from cola_train.families.autoregressive.config import AutoregressiveRunConfig
    from cola_train.families.checkpoint import Checkpoint
    from cola_train.families.cola.config import JointRunConfig, VAERunConfig
    from cola_train.families.family import Family
    from cola_train.families.generate import GenerationResult, generate
    from cola_train.families.masked_diffusion.config import LLaDARunConfig
    from cola_train.families.registry import family_of, load_run_config, register_family
    from cola_train.models.config import DiTConfig, TextVAEConfig, TransformerConfig
    from cola_train.objectives.objective import Objective, Term, total_loss
    from cola_train.training.run import train

# Written out three times: type checkers read the imports above and this list, never the table.
__all__ = [
    "AutoregressiveRunConfig",
    "Batch",
    "Checkpoint",
    "CorpusConfig",
    "DataConfig",
    "DiTConfig",
    "Family",
    "GenerationResult",
    "JointRunConfig",
    "LLaDARunConfig",
    "Objective",
    "OptimConfig",
    "PackedRows",
    "PrepareConfig",
    "PreparedData",
    "RunConfig",
    "SamplerConfig",
    "Term",
    "TextVAEConfig",
    "TokenizerTrainConfig",
    "TrainerConfig",
    "TransformerConfig",
    "UserError",
    "VAERunConfig",
    "family_of",
    "generate",
    "load_config",
    "load_run_config",
    "prepare",
    "register_family",
    "total_loss",
    "train",
    "train_tokenizer",
]

_HOMES = {
    "AutoregressiveRunConfig": "cola_train.families.autoregressive.config",
    "Batch": "cola_train.data.batch",
    "Checkpoint": "cola_train.families.checkpoint",
    "CorpusConfig": "cola_train.config.data",
    "DataConfig": "cola_train.config.data",
    "DiTConfig": "cola_train.models.config",
    "Family": "cola_train.families.family",
    "GenerationResult": "cola_train.families.generate",
    "JointRunConfig": "cola_train.families.cola.config",
    "LLaDARunConfig": "cola_train.families.masked_diffusion.config",
    "Objective": "cola_train.objectives.objective",
    "OptimConfig": "cola_train.config.optim",
    "PackedRows": "cola_train.data.batch",
    "PrepareConfig": "cola_train.config.data",
    "PreparedData": "cola_train.data.prepared",
    "RunConfig": "cola_train.config.run",
    "SamplerConfig": "cola_train.config.sampling",
    "Term": "cola_train.objectives.objective",
    "TextVAEConfig": "cola_train.models.config",
    "TokenizerTrainConfig": "cola_train.config.data",
    "TrainerConfig": "cola_train.config.loop",
    "TransformerConfig": "cola_train.models.config",
    "UserError": "cola_train.config.settings",
    "VAERunConfig": "cola_train.families.cola.config",
    "family_of": "cola_train.families.registry",
    "generate": "cola_train.families.generate",
    "load_config": "cola_train.config.load",
    "load_run_config": "cola_train.families.registry",
    "prepare": "cola_train.data.prepare",
    "register_family": "cola_train.families.registry",
    "total_loss": "cola_train.objectives.objective",
    "train": "cola_train.training.run",
    "train_tokenizer": "cola_train.data.tokenizer",
}

# Type checkers would take a module's `__getattr__` for leave to use any name at all.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        """Import a public name's module when the name is first used."""
        if name not in _HOMES:
            raise AttributeError(f"module 'cola_train' has no attribute '{name}'")
        import importlib

        return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """The public names too, before they are imported."""
    return sorted({*globals(), *__all__})
