"""Studies whose runs take seconds."""

import json
from pathlib import Path

from cola_train.config.load import load_config
from cola_train.scaling.study.config import StudyConfig
from cola_train.scaling.study.trials import TrialRun, trial_runs
from tests.helpers.runs import SMALL, SMALL_DIT, SMALL_TRANSFORMER
from tests.scaling.test_ladder import write_config

SHORT = {"num_openings": 4, "num_new_tokens": 4, "brier_places": 0}


def write_study(into: Path, data: Path | str, **changes: object) -> Path:
    """A VAE, two priors that start from it, and an AR model; two steps each."""
    shared = [setting for setting in SMALL if not setting.startswith("vae.")]
    vae = [setting for setting in SMALL if setting.startswith("vae.")]
    frozen = {
        "objective": {"reference_weight": 0, "mask_weight": 0, "vae_strategy": {"mode": "fix"}},
        "init_vae_from": "set later",
    }
    write_config(into / "vae.yaml", "vae", [*shared, *vae])
    write_config(into / "joint.yaml", "joint", [*shared, *vae, *SMALL_DIT], **frozen)
    write_config(into / "ar.yaml", "ar", [*shared, *SMALL_TRANSFORMER])
    spec = {
        "folder": str(into / "study"),
        "config": "joint.yaml",
        "settings": [
            f"data.path={data}",
            "trainer.max_steps=2",
            "trainer.validate_every_steps=2",
            "checkpoint.every_steps=1000",
        ],
        "trials": {
            "base": {"why": "the recipe", "settings": ["init_vae_from={first}"]},
            "loc": {
                "why": "times where context matters",
                "settings": ["init_vae_from={first}", "objective.flow.time_loc=0"],
                "seeds": [66, 67],
            },
            "ar": {"config": "ar.yaml"},
            "first": {"why": "what they start from", "config": "vae.yaml"},
        },
        "inspection": {"num_rows": 4, "num_steps": 2, "num_times": 2, "map_latents": 8},
        "comparisons": {"unguided": SHORT},
        **changes,
    }
    (into / "study.yaml").write_text(json.dumps(spec), encoding="utf-8")  # JSON is YAML
    return into / "study.yaml"


def read(path: Path) -> tuple[StudyConfig, list[TrialRun]]:
    spec = load_config(StudyConfig, path)
    return spec, trial_runs(spec, path.parent)
