"""Train Cola DLM, a continuous latent diffusion language model. Public names; heavy imports happen on first use."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cola_train.config.sampling import SamplerConfig
    from cola_train.families.checkpoint import Checkpoint
    from cola_train.families.generate import GenerationResult, generate

__all__ = ["Checkpoint", "GenerationResult", "SamplerConfig", "generate"]

_HOMES = {
    "Checkpoint": "cola_train.families.checkpoint",
    "GenerationResult": "cola_train.families.generate",
    "SamplerConfig": "cola_train.config.sampling",
    "generate": "cola_train.families.generate",
}


def __getattr__(name: str) -> Any:
    # A wrong config value is refused before torch is imported: `import cola_train` must not import it.
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'cola_train' has no attribute '{name}'")
