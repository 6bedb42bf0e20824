"""Makes the golden set anew: `python -m tests.golden.make` (README.md beside this file says when).

Refuses to write anything unless our code, in the same run, agrees with all that the released code
computed (../shared/golden).
"""

import copy
import hashlib
import json
import platform
import shutil
import subprocess
import sys
import tempfile
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from cola_train.families.autoregressive.checkpoint import AutoregressiveCheckpoint
from cola_train.families.checkpoint import Checkpoint
from cola_train.families.cola.checkpoint import ColaCheckpoint
from tests.golden import computed
from tests.golden.families import (
    FAMILIES,
    FOLDER,
    AnyCheckpoint,
    checkpoint,
    inputs,
    networks_of,
    objectives,
    prompts,
    samplers,
)

ROOT = FOLDER.parents[1]
REFERENCE = ROOT.parent / "shared" / "golden"
# What compares with the released code; and, for the baselines, which it has not, with Hugging
# Face's Llama.
PROOFS = (
    "tests/models/test_golden.py",
    "tests/sampling/test_golden.py",
    "tests/families/cola/test_format.py",
    "tests/models/test_transformer.py",
    "tests/families/transformer/test_format.py",
)
MAX_BYTES = 2_000_000
# Far above fp32's rounding: ids that stay the same under it are the same on every CPU.
NUDGE, NUDGES = 1e-6, 3
_CURE = "give families.py another SEED."


class Refusal(SystemExit):
    """Why nothing was written."""


def prove(reference: Path, tests: Sequence[str]) -> int:
    """How many comparisons passed.

    Raises:
        Refusal: there is no reference, or a comparison failed, was skipped or was not found.
    """
    if not reference.is_dir():
        raise Refusal(
            f"Nothing was written: {reference} is absent, and only what agrees with the released "
            "code may be kept."
        )
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            f"--junitxml={report}",
            *tests,
        ]
        code = subprocess.run(command, cwd=ROOT, check=False).returncode
        suite = ElementTree.parse(report).getroot()[0].attrib if report.is_file() else {}
    ran, skipped = int(suite.get("tests", 0)), int(suite.get("skipped", 0))
    if code != 0 or ran == 0 or skipped > 0:
        raise Refusal(
            f"Nothing was written: pytest ended with {code} after {ran} comparisons, {skipped} of "
            "them skipped; see above."
        )
    return ran


def nudged(made: AnyCheckpoint, seed: int) -> AnyCheckpoint:
    """The checkpoint with every weight off by about NUDGE of itself."""
    other = copy.deepcopy(made)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for network in networks_of(other).values():
            for parameter in network.parameters():
                parameter.mul_(1 + NUDGE * torch.randn(parameter.shape, generator=generator))
    return other


def write_family(family: str, folder: Path) -> None:
    """The family's checkpoint, inputs, and everything that is computed from them.

    Raises:
        Refusal: ids or an accuracy that rounding could change.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The VAE has scaling_factor")
        checkpoint(family).save(folder)
    # From here on as the tests do: from what was written.
    made = Checkpoint.load(folder)
    given = inputs(family)
    save_file(given, folder / "inputs.safetensors")
    save_file(computed.forward(made, given), folder / "outputs.safetensors")
    losses = {
        name: computed.losses(made, given, settings)
        for name, settings in objectives(family).items()
    }
    texts, latents = {}, {}
    for name, config in samplers(family).items():
        texts[name], found = computed.samples(made, prompts(family), config)
        latents |= {f"{name}/{prompt}": value for prompt, value in found.items()}
    for other in (nudged(made, seed) for seed in range(NUDGES)):
        for name, config in samplers(family).items():
            if computed.samples(other, prompts(family), config)[0] != texts[name]:
                raise Refusal(
                    f"Nothing was written: rounding could change the ids of {family}, {name}; "
                    f"{_CURE}"
                )
        for name, settings in objectives(family).items():
            if _accuracies(computed.losses(other, given, settings)) != _accuracies(losses[name]):
                raise Refusal(
                    f"Nothing was written: rounding could change an accuracy of {family}, {name}; "
                    f"{_CURE}"
                )
    _write(folder / "losses.json", losses)
    _write(folder / "samples.json", {"prompts": prompts(family), "samples": texts})
    if latents:
        save_file(latents, folder / "latents.safetensors")


def _accuracies(losses: computed.FoundLosses) -> dict[str, float]:
    return {name: value for name, value in losses["figures"].items() if name.endswith("accuracy")}


def write_all(folder: Path, proofs: int) -> None:
    """The whole set into an empty folder.

    Raises:
        Refusal: ids or an accuracy that rounding could change; more bytes than MAX_BYTES.
    """
    for family in FAMILIES:
        write_family(family, folder / family)
    save_file(computed.draws(), folder / "draws.safetensors")
    cola, baseline = (
        ColaCheckpoint.load(folder / "base"),
        AutoregressiveCheckpoint.load(folder / "ar"),
    )
    save_file(computed.initial_weights(cola, baseline), folder / "initial.safetensors")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if (size := sum(path.stat().st_size for path in files)) > MAX_BYTES:
        raise Refusal(
            f"Nothing was written: the set would have {size} bytes, {MAX_BYTES} at most are "
            "allowed."
        )
    made_with = {
        "torch": torch.__version__,
        "machine": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
    digests = {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }
    _write(
        folder / "made.json",
        {"made_with": made_with, "comparisons_with_the_reference": proofs, "sha256": digests},
    )


def main() -> None:
    """Prove, make beside the old set, then put the new one in its place."""
    torch.set_num_threads(1)
    proofs = prove(REFERENCE, PROOFS)
    with tempfile.TemporaryDirectory() as temporary:
        write_all(Path(temporary), proofs)
        for made in sorted(Path(temporary).iterdir()):
            old = FOLDER / made.name
            if old.is_dir():
                shutil.rmtree(old)
            shutil.move(made, old)
    print(f"{FOLDER}: made anew after {proofs} comparisons with the reference.")


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
