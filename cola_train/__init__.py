"""Train Cola DLM, a continuous latent diffusion language model.

The names here are the stable ones (docs/python.md); modules below may move. Each is imported at
its first use: `import cola_train` imports no torch.
"""

from typing import TYPE_CHECKING

# Written out twice: type checkers read these imports, never the table. They would also take a
# module's `__getattr__` for leave to use any name at all.
if TYPE_CHECKING:
    from cola_train.config.data import CorpusConfig as CorpusConfig
    from cola_train.config.data import DataConfig as DataConfig
    from cola_train.config.data import GeneratedConfig as GeneratedConfig
    from cola_train.config.data import PrepareConfig as PrepareConfig
    from cola_train.config.data import TokenizerTrainConfig as TokenizerTrainConfig
    from cola_train.config.load import load_config as load_config
    from cola_train.config.loop import TrainerConfig as TrainerConfig
    from cola_train.config.optim import OptimConfig as OptimConfig
    from cola_train.config.run import RunConfig as RunConfig
    from cola_train.config.sampling import SamplerConfig as SamplerConfig
    from cola_train.config.settings import UserError as UserError
    from cola_train.data.batch import Batch as Batch
    from cola_train.data.batch import PackedRows as PackedRows
    from cola_train.data.prepare import prepare as prepare
    from cola_train.data.prepared import PreparedData as PreparedData
    from cola_train.data.tokenizer_training import train_tokenizer as train_tokenizer
    from cola_train.families.autoregressive.family import (
        AutoregressiveRunConfig as AutoregressiveRunConfig,
    )
    from cola_train.families.checkpoint import Checkpoint as Checkpoint
    from cola_train.families.cola.config import JointRunConfig as JointRunConfig
    from cola_train.families.cola.config import VAERunConfig as VAERunConfig
    from cola_train.families.family import Family as Family
    from cola_train.families.family import TrainedRun as TrainedRun
    from cola_train.families.generate import GenerationResult as GenerationResult
    from cola_train.families.generate import generate as generate
    from cola_train.families.masked_diffusion.family import LLaDARunConfig as LLaDARunConfig
    from cola_train.families.registry import family_of as family_of
    from cola_train.families.registry import load_run_config as load_run_config
    from cola_train.families.registry import register_family as register_family
    from cola_train.models.config import DiTConfig as DiTConfig
    from cola_train.models.config import TextVAEConfig as TextVAEConfig
    from cola_train.models.config import TransformerConfig as TransformerConfig
    from cola_train.objectives.objective import Objective as Objective
    from cola_train.objectives.objective import Term as Term
    from cola_train.objectives.objective import total_loss as total_loss
    from cola_train.training.run import train as train
else:
    _NAMES = {
        "cola_train.config.data": "CorpusConfig DataConfig GeneratedConfig PrepareConfig "
        "TokenizerTrainConfig",
        "cola_train.config.load": "load_config",
        "cola_train.config.loop": "TrainerConfig",
        "cola_train.config.optim": "OptimConfig",
        "cola_train.config.run": "RunConfig",
        "cola_train.config.sampling": "SamplerConfig",
        "cola_train.config.settings": "UserError",
        "cola_train.data.batch": "Batch PackedRows",
        "cola_train.data.prepare": "prepare",
        "cola_train.data.prepared": "PreparedData",
        "cola_train.data.tokenizer_training": "train_tokenizer",
        "cola_train.families.autoregressive.family": "AutoregressiveRunConfig",
        "cola_train.families.checkpoint": "Checkpoint",
        "cola_train.families.cola.config": "JointRunConfig VAERunConfig",
        "cola_train.families.family": "Family TrainedRun",
        "cola_train.families.generate": "GenerationResult generate",
        "cola_train.families.masked_diffusion.family": "LLaDARunConfig",
        "cola_train.families.registry": "family_of load_run_config register_family",
        "cola_train.models.config": "DiTConfig TextVAEConfig TransformerConfig",
        "cola_train.objectives.objective": "Objective Term total_loss",
        "cola_train.training.run": "train",
    }
    _HOMES = {name: module for module, names in _NAMES.items() for name in names.split()}
    __all__ = sorted(_HOMES)

    def __getattr__(name: str) -> object:
        """Import a public name's module when the name is first used."""
        if name not in _HOMES:
            raise AttributeError(f"module 'cola_train' has no attribute '{name}'")
        import importlib

        return getattr(importlib.import_module(_HOMES[name]), name)

    def __dir__() -> list[str]:
        """The public names too, before they are imported."""
        return sorted({*globals(), *__all__})
