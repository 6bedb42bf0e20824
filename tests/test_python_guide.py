"""docs/python.md: its blocks run and do what the page says; what `cola_train` exports is typed."""

import ast
import configparser
import contextlib
import dataclasses
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import cola_train
from cola_train import (
    Checkpoint,
    RunConfig,
    SamplerConfig,
    UserError,
    generate,
    load_run_config,
    train,
)
from tests.helpers.programs import ROOT, clean_environment
from tests.helpers.programs import cola_train as cola_train_program
from tests.helpers.runs import figures

GUIDE = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", GUIDE, flags=re.DOTALL)
PREPARE, TRAIN, OWN_LOOP = BLOCKS
# Of the block with a loop of one's own: what makes the config, and what no family changes.
OWN_CONFIG, OWN_LINES = OWN_LOOP.split("\nfamily = ", maxsplit=1)
OWN_LINES = f"family = {OWN_LINES}"


def execute(code: str, folder: Path, names: dict[str, Any] | None = None) -> dict[str, Any]:
    """Run a block in a folder, among `names`, which have what it made even if it fails."""
    names = {} if names is None else names
    with contextlib.chdir(folder):
        exec(compile(code, "docs/python.md", "exec"), names)
    return names


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, prepared_folder: Path) -> Path:
    """Where a user is who has texts, the configs, and has run the guide's first block."""
    folder = tmp_path_factory.mktemp("guide")
    shutil.copytree(ROOT / "configs", folder / "configs")
    (folder / "my_texts").mkdir()
    shutil.copy(prepared_folder.parent / "book.txt", folder / "my_texts")
    execute(PREPARE, folder)
    return folder


@pytest.fixture(scope="module")
def trained(place: Path) -> dict[str, Any]:
    """The names of the block that trains both stages."""
    return execute(TRAIN, place)


def first_logged_loss(config: RunConfig, place: Path) -> float:
    """The loss of the first step of `train`, in fp32 as the guide's own loop computes."""
    name = f"{config.name}-by-train"
    brief = {"max_steps": 1, "log_every_steps": 1, "precision": "fp32", "accelerator": "cpu"}
    trainer = dataclasses.replace(config.trainer, **brief)
    with contextlib.chdir(place):
        train(dataclasses.replace(config, name=name, runs_folder="checkpoints", trainer=trainer))
    found = figures(place / "checkpoints" / name)[1, "train/loss"]
    assert found is not None
    return found


def test_the_first_block_prepares_what_the_others_read(place: Path, prepared_folder: Path) -> None:
    names = {path.name for path in prepared_folder.iterdir()} - {"manifest.json"}
    assert len(names) == 7  # tokens, documents and checks of two splits, and the tokenizer
    for name in names:
        made = (place / "data" / "rows" / name).read_bytes()
        assert made == (prepared_folder / name).read_bytes(), name


@pytest.mark.slow
def test_program_and_command_line_end_with_equal_weights(
    place: Path, trained: dict[str, Any]
) -> None:
    runs = place / "checkpoints"
    start = "init_vae_from=checkpoints/cli-vae"
    for verb, *settings in (["vae", "name=cli-vae"], ["joint", "name=cli-joint", start]):
        words = [verb, f"configs/small/{verb}_quickstart.yaml", *trained["shared"], *settings]
        cola_train_program(*words, cwd=place).check_returncode()
    for name in ("vae", "joint"):
        ours, theirs = (Checkpoint.load(runs / f"{who}-{name}") for who in ("my", "cli"))
        assert ours.training["step"] == theirs.training["step"] == 20
        assert ours.networks.keys() == theirs.networks.keys()
        for network in ours.networks:
            ours_by_name = ours.networks[network].state_dict()
            theirs_by_name = theirs.networks[network].state_dict()
            assert ours_by_name.keys() == theirs_by_name.keys()
            for key, value in ours_by_name.items():
                assert torch.equal(value, theirs_by_name[key]), f"{network}.{key}"
    (result,) = generate(theirs, ["It was"], SamplerConfig(max_new_tokens=8, guidance_scale=3.0))
    assert result.token_ids == trained["result"].token_ids


@pytest.mark.slow
@pytest.mark.parametrize("name", ["my-vae", "my-joint"])
def test_both_stages_learn(place: Path, trained: dict[str, Any], name: str) -> None:
    found = figures(place / "checkpoints" / name)
    reconstruction = "train/reconstruction_nats_per_token"
    first, last = (found[step, reconstruction] for step in (10, 20))
    assert first is not None
    assert last is not None
    assert last < 0.99 * first


@pytest.mark.slow
def test_a_loop_of_ones_own_begins_as_train_does_and_learns(place: Path) -> None:
    names = execute(OWN_LOOP, place)
    losses = names["losses"]
    assert losses[0] == pytest.approx(first_logged_loss(names["config"], place), rel=1e-6)
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    in_memory, loaded = names["checkpoint"], Checkpoint.load(place / "exported" / "my-loop")
    assert loaded.trained_seq_len == 32
    config = SamplerConfig(max_new_tokens=8)
    texts = [generate(one, ["It was"], config)[0].token_ids for one in (in_memory, loaded)]
    assert texts[0] == texts[1]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["vae", "joint", "llada"])
def test_the_lines_of_that_loop_are_the_same_for_all_families(
    place: Path, trained: dict[str, Any], baseline_config: Callable[..., RunConfig], stage: str
) -> None:
    """A joint run here starts from a checkpoint, and holds a reference encoder."""
    names = execute(OWN_CONFIG, place)
    if stage == "llada":
        config = baseline_config("llada", "llada")
    else:
        config = load_run_config(place / "checkpoints" / f"my-{stage}" / "config.yaml")
    names["config"] = config
    code = OWN_LINES.replace("range(30)", "range(2)").replace("my-loop", f"own-{stage}")
    writes_text = contextlib.nullcontext() if stage != "vae" else pytest.raises(UserError)
    with writes_text:
        execute(code, place, names)
    assert names["losses"][0] == pytest.approx(first_logged_loss(config, place), rel=1e-6)
    assert names["losses"][1] != names["losses"][0]
    assert Checkpoint.load(place / "exported" / f"own-{stage}").family


def test_the_entry_point_is_that_of_the_example() -> None:
    (block,) = re.findall(r"```toml\n(.*?)```", GUIDE, flags=re.DOTALL)
    example = configparser.ConfigParser()
    example.read(ROOT / "tests/third_party/bigram-0.1.dist-info/entry_points.txt")
    group = tomllib.loads(block)["project"]["entry-points"]
    assert group == {"cola_train.families": dict(example["cola_train.families"])}


def test_the_three_lists_of_public_names_are_one() -> None:
    tree = ast.parse(Path(cola_train.__file__).read_text(encoding="utf-8"))
    (guarded,) = (
        node for node in tree.body if isinstance(node, ast.If) and isinstance(node.test, ast.Name)
    )
    imported = {
        alias.name: node.module
        for node in guarded.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert imported == cola_train._HOMES
    assert sorted(imported) == sorted(cola_train.__all__)


@pytest.mark.parametrize("name", cola_train.__all__)
def test_every_public_name_is_the_one_of_its_module(name: str) -> None:
    found = getattr(cola_train, name)
    assert (found.__name__, found.__module__) == (name, cola_train._HOMES[name])
    assert name in dir(cola_train)


def test_another_name_is_refused() -> None:
    with pytest.raises(AttributeError, match="module 'cola_train' has no attribute 'trian'"):
        _ = cola_train.trian  # type: ignore[attr-defined]
    with pytest.raises(ImportError, match="cannot import name 'trian'"):
        exec("from cola_train import trian")


def test_neither_the_package_nor_its_configs_import_torch() -> None:
    code = """
import sys
import cola_train
seen = ["torch" in sys.modules]
for name in cola_train.__all__:
    if name.endswith("Config") or name in ("Family", "UserError", "load_config", "load_run_config"):
        getattr(cola_train, name)
seen.append("torch" in sys.modules)
cola_train.train
seen.append("torch" in sys.modules)
print(seen)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=clean_environment(),
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    assert done.stdout.strip() == "[False, False, True]"


@pytest.mark.slow
def test_the_blocks_pass_mypys_strictest_and_mistakes_do_not(
    tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    (in_readme,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    files = {f"block_{number}.py": code for number, code in enumerate([*BLOCKS, in_readme])}
    names = cola_train.__all__
    files["names.py"] = f"from cola_train import {', '.join(names)}\n" + "".join(
        f"reveal_type({name})\n" for name in names
    )
    files["wrong.py"] = "import cola_train\ncola_train.trian\ncola_train.DataConfig(path=3)\n"
    for name, code in files.items():
        (tmp_path / name).write_text(code, encoding="utf-8")
    # Kept between sessions: reading torch's types takes mypy a minute.
    assert pytestconfig.cache is not None
    cache = pytestconfig.cache.mkdir("mypy_of_users")
    # As for a package that is installed: users see the errors of their own files. No settings file,
    # ours or theirs, makes it milder.
    options = ["--strict", "--follow-imports=silent", "--config-file=", f"--cache-dir={cache}"]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *options, *files],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "MYPYPATH": str(ROOT)},
    )
    lines = done.stdout.splitlines()
    errors = [line for line in lines if ": error: " in line]
    assert [line.split(":")[:2] for line in errors] == [["wrong.py", "2"], ["wrong.py", "3"]], lines
    revealed = [line for line in lines if "Revealed type is" in line]
    assert len(revealed) == len(names)
    assert not [line for line in revealed if line.endswith('is "Any"')]
