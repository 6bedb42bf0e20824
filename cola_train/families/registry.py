"""Which families there are: the project's, those of entry points, and registered ones.

An entry point names a `Family` object or class: in a package's pyproject.toml,

    [project.entry-points."cola_train.families"]
    bigram = "my_package.bigram:BigramFamily"
"""

import dataclasses
import importlib.metadata
import pkgutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cola_train.config.load import build_config, read_values
from cola_train.config.run import RunConfig
from cola_train.config.settings import UserError, require
from cola_train.run_layout import EXPORT

if TYPE_CHECKING:
    import torch

    from cola_train.families.checkpoint import Checkpoint
    from cola_train.families.family import Family

_BUILT_IN = {
    "vae": "cola_train.families.cola.family:TextVAEFamily",
    "joint": "cola_train.families.cola.stage2_family:JointFamily",
    "distill": "cola_train.families.cola.stage2_family:DistillFamily",
    "ar": "cola_train.families.autoregressive.family:AutoregressiveFamily",
    "llada": "cola_train.families.masked_diffusion.family:MaskedDiffusionFamily",
}
_known: dict[str, "Family[Any]"] = {}
_registered: dict[str, "Family[Any]"] = {}


def families() -> dict[str, "Family[Any]"]:
    """Every family by its name: the project's, those of entry points, registered ones."""
    if not _known:
        for name, place in _BUILT_IN.items():
            _known[name] = pkgutil.resolve_name(place)()
        for entry in importlib.metadata.entry_points(group="cola_train.families"):
            found = entry.load()
            family = found() if isinstance(found, type) else found
            require(
                family.name not in _known,
                f"Two families are named {family.name!r}: uninstall one of the packages that bring "
                "them.",
            )
            _known[family.name] = family
    return {**_known, **_registered}


def register_family(family: "Family[Any]") -> None:
    """Add a family in this process; one of the same name that was registered before is replaced.

    Programs that start others (several processes, curves, chaos) need an entry point instead.

    Raises:
        UserError: the name is that of a family of the project or of an entry point.
    """
    require(
        family.name not in families() or family.name in _registered,
        f"There is a family {family.name!r} already: give yours another name.",
    )
    _registered[family.name] = family


def family_named(name: str) -> "Family[Any]":
    """The family of this name.

    Raises:
        UserError: there is none.
    """
    found = families()
    require(name in found, f"There is no family {name!r}; there are {', '.join(found)}.")
    return found[name]


def family_of(config: RunConfig) -> "Family[Any]":
    """The family that a run config is of."""
    return family_named(config.stage)


def load_run_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """A config file of any family, see `family_of_file`.

    Raises:
        UserError: as `load_config` and `family_of_file`.
    """
    values = read_values(path)
    return build_config(_family_of_values(values, path).config, values, str(path), overrides)


def family_of_file(path: Path) -> "Family[Any]":
    """The family that a config file names as `stage`, or else the smallest that knows its keys.

    Raises:
        UserError: no such file, an unknown stage, or a file that does not say which of several.
    """
    return _family_of_values(read_values(path), path)


def _family_of_values(values: Mapping[str, Any], path: Path) -> "Family[Any]":
    found = families()
    if "stage" in values:
        require(
            values["stage"] in found,
            f"{path} says `stage: {values['stage']}`, and there is no such family; there are "
            f"{', '.join(found)}.",
        )
        return found[values["stage"]]
    # A key that none knows is refused by its name later.
    fields = {
        name: {field.name for field in dataclasses.fields(family.config)}
        for name, family in found.items()
    }
    fit = {name: (len(values.keys() & known), -len(known)) for name, known in fields.items()}
    best = [name for name, score in fit.items() if score == max(fit.values())]
    names = ", ".join(found)
    require(len(best) == 1, f"{path} must say what it is for as `stage:`, one of {names}.")
    return found[best[0]]


def load_checkpoint(folder: str | Path, device: "str | torch.device" = "cpu") -> "Checkpoint":
    """A checkpoint of any family, as its own `load` reads it; a run folder stands for its export.

    Raises:
        UserError: there is none; or as of `Family.load`.
    """
    folder = Path(folder)
    for root in (folder, folder / EXPORT):
        for family in families().values():
            if family.recognizes(root):
                return family.load(root, device)
    from cola_train.export_files import model_type
    from cola_train.tensor_files import absence, pickle_hint

    found = model_type(folder)
    hint = ""
    if found is not None:
        hint = f" Its config.json says model_type = {found!r}, which is that of no family here."
    raise UserError(
        f"{folder} {absence(folder)}holds no checkpoint of any family ({', '.join(families())}): "
        "give an exported folder (cola_dlm/cola_vae for Cola DLM, a config.json for a baseline), "
        "or a run folder that has been exported (cola-train export RUN)."
        f"{hint}{pickle_hint(folder)}"
    )
