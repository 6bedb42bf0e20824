"""The `inspect` verb: the latent space as numbers, as a page of plots and as a table."""

import dataclasses
import json
from pathlib import Path

from tqdm import tqdm

from cola_train.config.evaluation import InspectionConfig
from cola_train.data.packing import VALIDATION
from cola_train.data.prepared import PreparedData
from cola_train.devices import named_device
from cola_train.families.registry import load_checkpoint
from cola_train.files import atomic_folder, require_new
from cola_train.run_layout import INSPECTION


def inspect_checkpoint(
    checkpoint_folder: Path,
    data_folder: Path,
    reference_folder: Path | None,
    out: Path | None,
    device: str,
    config: InspectionConfig,
) -> str:
    """Inspect a checkpoint into a new folder of inspection.json, .png and .svg; returns the table.

    Without `out` the folder is CHECKPOINT/inspection.

    Raises:
        UserError: as `Checkpoint.inspect`; no such checkpoint or data; the folder exists, or cannot
            be written.
    """
    out = checkpoint_folder / INSPECTION if out is None else out
    require_new(out)
    data, at = PreparedData.open(data_folder), named_device(device)
    reference = None if reference_folder is None else load_checkpoint(reference_folder, at)
    checkpoint = load_checkpoint(checkpoint_folder, at)
    with atomic_folder(out) as working:
        num_rows = min(config.num_rows, data.num_rows(VALIDATION))
        with tqdm(total=num_rows, desc="inspecting", unit="row") as bar:
            for inspection in checkpoint.inspect(data, config, reference):
                if inspection is None:
                    bar.update(min(config.batch_size, num_rows - bar.n))
        assert inspection is not None
        facts = {
            "checkpoint": str(checkpoint_folder),
            "training": checkpoint.training,
            "reference": None if reference_folder is None else str(reference_folder),
            "data": str(data_folder),
            "settings": dataclasses.asdict(config),
        }
        # In ASCII: names of files need not be UTF-8.
        content = json.dumps({**facts, **inspection.to_json()}, indent=1)
        (working / "inspection.json").write_text(content + "\n", encoding="utf-8")
        png, svg = working / "inspection.png", working / "inspection.svg"
        inspection.draw(checkpoint_folder.name, png, svg)
    looked_at = f"{inspection.num_rows} held-out rows, {inspection.num_tokens:,} tokens"
    lines = [f"{checkpoint_folder}: {looked_at}", ""]
    for name, value in inspection.metrics().items():
        lines.append(f"  {name.replace('/', ': ').replace('_', ' '):44}{value:12.5g}")
    for table in inspection.tables():
        lines += ["", table]
    if inspection.remarks():
        lines += ["", *inspection.remarks()]
    lines += ["", f"All numbers: {out / 'inspection.json'}", f"The page: {out / 'inspection.png'}"]
    return "\n".join(lines) + "\n"
