"""Defaults < YAML with bases < key=value, strictly."""

import builtins
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cola_train.config.load import leaves, load_config, to_yaml
from cola_train.config.optim import OptimConfig
from cola_train.config.settings import UserError
from cola_train.families.cola.config import JointRunConfig, VAERunConfig
from cola_train.families.registry import load_run_config

REQUIRED = ["name=run", "data.path=data/somewhere"]


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_overrides_win_over_yaml_which_wins_over_its_base_which_wins_over_defaults(
    tmp_path: Path,
) -> None:
    write(
        tmp_path / "base.yaml",
        "name: base\ndata: {path: d}\noptim: {learning_rate: 1e-3, warmup: 7}\n",
    )
    path = write(
        tmp_path / "child.yaml", "base: base.yaml\nname: child\noptim: {learning_rate: 2e-3}\n"
    )
    config = load_config(VAERunConfig, path, ["optim.beta2=0.9"])
    assert (config.name, config.optim.learning_rate, config.optim.warmup, config.optim.beta2) == (
        "child",
        2e-3,
        "7",
        0.9,
    )
    assert config.optim.weight_decay == OptimConfig().weight_decay


def test_the_saved_config_reads_back_equal(tmp_path: Path) -> None:
    config = load_config(
        JointRunConfig, None, [*REQUIRED, "objective.reference_weight=0", "vae.block_size=1"]
    )
    assert load_config(JointRunConfig, write(tmp_path / "saved.yaml", to_yaml(config))) == config


@pytest.mark.parametrize(
    "override, message",
    [
        (
            "optim.learning_rat=1",
            "Unknown config key 'optim.learning_rat'.*did you mean 'optim.learning_rate'",
        ),
        (
            "optimizer.learning_rate=1",
            "Unknown config key 'optimizer'.*did you mean 'optim.learning_rate'",
        ),
        ("trainer.max_steps=many", "'trainer.max_steps'.*many"),
        ("trainer.max_steps=1.5", "'trainer.max_steps'.*a whole number, not 1.5"),
        ("trainer.precision=fp16", "'trainer.precision'.*one of fp32, bf16, fp8, auto, not fp16"),
        ("optim=3", "'optim'.*is a section of keys, not the value 3"),
        ("trainer.max_steps", "is not an override; write key=value"),
        ("trainer.max_steps=0", "trainer.max_steps must be at least 1, not 0"),
        ("name=a/b", "plain folder name, not 'a/b'"),
        (
            "data.seq_len=500",
            (
                r"data.seq_len \(500\) must be a multiple of patch_size x block_size \(1 x 16 = "
                r"16\).*496 or 512"
            ),
        ),
        ("vae.block_size=3", r"vae.block_size \(3\) must divide dit.block_size \(16\)"),
        ("vae.shared_heads_kv=2", "shared_heads_kv = 2 is not supported"),
        ("dit.txt_in_channels=8", "txt_out_channels = 16 is not supported"),
        ("objective.reference_weight=0.1", "needs a stage-1 encoder.*init_vae_from"),
        ("objective.vae_strategy.mode=fix", "needs a trained VAE"),
        ("objective.mask_ratio=1.5", r"mask_ratio must be in \(0, 1\].*, not 1.5"),
        (
            "trainer.global_batch_size=10",
            r"multiple of trainer.micro_batch_size x parallel.num_processes \(8 x 1 = 8\)",
        ),
        ("optim.warmup=2 weeks", "optim.warmup must be an amount such as '5000 steps'"),
    ],
)
def test_a_wrong_key_or_value_gets_one_clear_message(override: str, message: str) -> None:
    scratch = [*REQUIRED, "objective.reference_weight=0", "dit.block_size=16", "vae.block_size=1"]
    with pytest.raises(UserError, match=message):
        load_config(JointRunConfig, None, [*scratch, override])


def test_missing_required_values_are_named() -> None:
    with pytest.raises(UserError, match=r"lacks a value for: data.path, name"):
        load_config(VAERunConfig, None, [])


@pytest.mark.parametrize(
    "text, message",
    [
        ("a: [1", "is not valid YAML"),
        (
            "seed: 1\nseed: 2\n",
            "the key 'seed' stands twice .lines 1 and 2.; leave one of them out",
        ),
        ("just words", "must hold keys and values at the top level, not one value"),
        ("7", "must hold keys and values at the top level, not one value"),
        ("- 1\n", "must hold keys and values at the top level"),
        ("base: [3]\n", "`base` must be the name of another YAML file"),
        ("base: self.yaml\n", "goes in a circle"),
        ("nmae: x\n", "Unknown config key 'nmae' in .*did you mean 'name'"),
    ],
)
def test_a_bad_file_gets_one_clear_message(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=f"(?s){message}"):
        load_config(VAERunConfig, write(tmp_path / "self.yaml", text), REQUIRED)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    write(tmp_path / "vae_paper.yaml", "")
    with pytest.raises(
        UserError, match=r"There is no config file .*vae_papr.yaml; did you mean 'vae_paper.yaml'"
    ):
        load_config(VAERunConfig, tmp_path / "vae_papr.yaml")
    (tmp_path / "small").mkdir()
    write(tmp_path / "small" / "smoke.yaml", "")
    with pytest.raises(
        UserError, match=r"There is no config file .*smoke.yaml; did you mean 'small/smoke.yaml'"
    ):
        load_config(VAERunConfig, tmp_path / "smoke.yaml")
    with pytest.raises(UserError, match=r"is a folder; give a .yaml"):
        load_config(VAERunConfig, tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9\n")
    with pytest.raises(UserError, match=r"not UTF-8 text \(byte 9\)"):
        load_config(VAERunConfig, tmp_path / "latin.yaml")


def test_every_setting_says_what_it_is() -> None:
    for config_class in (VAERunConfig, JointRunConfig):
        for key, field in leaves(config_class):
            assert field.metadata["help"].endswith("."), key


def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the YAML files that are opened from now on, by whatever code."""
    names: list[str] = []
    monkeypatch.setattr(io, "open", recording := _recording(names))
    monkeypatch.setattr(builtins, "open", recording)
    return names


def _recording(names: list[str]) -> Callable[..., Any]:
    original = io.open

    def recording(file: Any, *arguments: Any, **named: Any) -> Any:
        if str(file).endswith(".yaml"):
            names.append(Path(file).name)
        return original(file, *arguments, **named)

    return recording


def test_each_file_is_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "base.yaml", "name: base\ndata: {path: d}\nvae: {block_size: 1}\n")
    path = write(tmp_path / "child.yaml", "base: base.yaml\nstage: vae\n")
    names = opened(monkeypatch)
    assert load_config(VAERunConfig, path).name == "base"
    assert sorted(names) == ["base.yaml", "child.yaml"]
    names.clear()
    assert load_run_config(path, ["seed=3"]).seed == 3
    assert sorted(names) == ["base.yaml", "child.yaml"]


@pytest.mark.parametrize("text", ["", "# nothing yet\n", "null\n"])
def test_a_file_without_values_leaves_the_defaults(tmp_path: Path, text: str) -> None:
    assert (
        load_config(
            VAERunConfig, write(tmp_path / "empty.yaml", text), [*REQUIRED, "vae.block_size=1"]
        ).name
        == "run"
    )
