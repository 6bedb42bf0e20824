"""The verb that looks into a checkpoint's latent space: inspect."""

import argparse
from pathlib import Path
from typing import Any

from cola_train.cli.verb import add_verb, load_settings
from cola_train.config.inspection import InspectionConfig


def add(verbs: Any) -> None:
    """Add this verb."""
    verb = add_verb(
        verbs,
        "inspect",
        _inspect,
        "look into the latent space of a checkpoint: numbers, a page of pictures, a table",
        InspectionConfig,
        example="cola-train inspect checkpoints/NAME --data data/austen-64 --reference "
        "checkpoints/NAME-vae",
        positionals={
            "checkpoint": "a folder in the released layout, or a run folder, of stage 1 or 2"
        },
    )
    verb.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="prepared data, whose held-out rows are looked at",
    )
    verb.add_argument(
        "--reference",
        type=Path,
        metavar="CHECKPOINT",
        help="measure the encoder's drift from this stage-1 checkpoint",
    )
    verb.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="a new folder for the results [CHECKPOINT/inspection]",
    )
    verb.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1, ...; auto takes a GPU if there is one"
    )


def _inspect(options: argparse.Namespace) -> None:
    config = load_settings(options)
    from cola_train.evaluation.inspect import inspect_checkpoint

    print(
        inspect_checkpoint(
            options.checkpoint, options.data, options.reference, options.out, options.device, config
        )
    )
