"""Checkpoints on disk: what is kept, what is exported, what a new run may take from an old one, and
positions far into a run.
"""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from cola_train import tensor_files
from cola_train.checksums import FileChecksum
from cola_train.cli import main
from cola_train.config.load import to_yaml
from cola_train.config.sampling import SamplerConfig
from cola_train.data.batch import row_index
from cola_train.data.packing import TRAIN, documents_file, tokens_file
from cola_train.data.prepared import MANIFEST_FILE
from cola_train.families.cola.checkpoint import ColaCheckpoint
from cola_train.families.cola.config import JointRunConfig, VAERunConfig
from cola_train.families.generate import generate
from cola_train.run_layout import folder_of
from cola_train.training.callbacks.in_loop_evaluation import plain_copy
from cola_train.training.callbacks.saver import Saver
from cola_train.training.checkpoints import folder as checkpoint
from cola_train.training.checkpoints.folder import (
    CheckpointManifest,
    begin,
    clean,
    finish,
    intact_manifest,
    latest_checkpoint,
    remove_old,
    saved_steps,
    step_folder,
)
from cola_train.training.data import RunData
from cola_train.training.loop.module import StageModule
from cola_train.training.loop.state import RunState
from cola_train.training.loop.step_log import Attempt, read_step_log
from cola_train.training.run import train
from tests.helpers.runs import figures


def make(run_folder: Path, step: int, *, good: bool = False, mark: bool = False) -> None:
    working = begin(run_folder, step)
    finish(
        run_folder,
        working,
        CheckpointManifest(step, RunState(step=step), "d", 1, {}, {}, good, mark),
    )


@given(
    kinds=st.lists(st.sampled_from(["plain", "good", "mark"]), min_size=1, max_size=12),
    keep=st.integers(1, 4),
)
def test_the_newest_the_last_good_and_the_marks_are_kept(
    tmp_path_factory: pytest.TempPathFactory, kinds: list[str], keep: int
) -> None:
    run = tmp_path_factory.mktemp("run")
    for step, kind in enumerate(kinds):
        make(run, step, good=kind == "good", mark=kind == "mark")
        remove_old(run, keep)
        sofar = kinds[: step + 1]
        expected = set(range(len(sofar))[-keep:]) | {n for n, k in enumerate(sofar) if k == "mark"}
        expected |= set([n for n, k in enumerate(sofar) if k == "good"][-1:])
        assert set(saved_steps(run)) == expected
        assert latest_checkpoint(run) == step_folder(run, step)


def test_what_a_save_cut_short_leaves_is_cleaned_and_never_taken_for_a_checkpoint(
    tmp_path: Path,
) -> None:
    make(tmp_path, 3)
    (begin(tmp_path, 6) / "shard-00001.safetensors").write_bytes(b"half")
    assert saved_steps(tmp_path) == [3]
    assert latest_checkpoint(tmp_path) == step_folder(tmp_path, 3)
    clean(tmp_path)
    assert [path.name for path in (tmp_path / "lightning").iterdir()] == ["latest", "step-00000003"]


@pytest.mark.parametrize("step", [3, 6, 8])
def test_a_crash_between_a_checkpoints_name_and_the_pointer_costs_nothing(
    vae_config: Callable[..., VAERunConfig], monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    config = vae_config("run", "trainer.max_steps=8")
    point = checkpoint.point_to

    def dies(folder: Path) -> None:
        if folder.name.endswith(str(step)):
            raise KeyboardInterrupt
        point(folder)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "point_to", dies)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    run = folder_of(config)
    assert saved_steps(run)[-1] == step
    assert latest_checkpoint(run) == step_folder(run, step)  # also for who repairs nothing
    train(config)
    assert latest_checkpoint(run) == step_folder(run, 8)
    attempts = [entry.from_step for entry in read_step_log(run) if isinstance(entry, Attempt)]
    assert attempts == ([0, step] if step < 8 else [0])
    train(vae_config("whole", "trainer.max_steps=8"))
    assert figures(run) == figures(run.parent / "whole")
    assert (run / "hf" / "cola_dlm").is_dir()


@given(st.data())
def test_a_manifest_reads_back_and_knows_a_changed_character(data: st.DataObject) -> None:
    state = RunState(step=5, recent_losses={"a": [0.1, 1e-9]})
    manifest = CheckpointManifest(
        5,
        state,
        "ab",
        2,
        {"model.a": (2, 3), "step.a": ()},
        {"f": FileChecksum(7, "cd")},
        True,
        False,
    )
    text = manifest.to_json()
    assert CheckpointManifest.from_json(text) == manifest
    place = data.draw(st.integers(0, len(text) - 1))
    changed = text[:place] + data.draw(st.sampled_from("0x")) + text[place + 1 :]
    try:
        # the character it was, or white space
        assert CheckpointManifest.from_json(changed) == manifest
    except (ValueError, KeyError, TypeError, AttributeError):
        return


def test_marks_are_made_and_kept(vae_config: Callable[..., VAERunConfig]) -> None:
    marked = ["checkpoint.every_steps=5", "checkpoint.keep=1", "budget.marks=[1,2]"]
    config = vae_config("run", *marked, "trainer.validate_every_steps=0")
    train(config)
    assert saved_steps(folder_of(config)) == [1, 2, 6]


def test_the_last_validated_checkpoint_outlives_newer_ones(
    vae_config: Callable[..., VAERunConfig],
) -> None:
    config = vae_config(
        "run", "checkpoint.every_steps=1", "checkpoint.keep=1", "trainer.validate_every_steps=4"
    )
    train(config)
    assert saved_steps(folder_of(config)) == [4, 6]
    assert intact_manifest(step_folder(folder_of(config), 4)).good


# Export.


def test_an_export_is_the_live_weights_to_the_bit_and_samples_like_them(
    joint_config: Callable[..., JointRunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    live: dict[str, torch.Tensor] = {}
    modules: list[StageModule] = []
    saves = Saver.on_train_batch_end

    def remembered(saver: Saver, trainer: Any, module: Any, *rest: Any) -> None:
        saves(saver, trainer, module, *rest)
        modules.append(module)
        live.update(
            {
                name: getattr(t, "full_tensor", lambda t=t: t)().clone()
                for name, t in module.objective.state_dict().items()
            }
        )

    monkeypatch.setattr(Saver, "on_train_batch_end", remembered)
    config = joint_config("run", "objective.fixed_log_snr=2.5")
    train(config)
    run = folder_of(config)
    exported = ColaCheckpoint.load(run)
    assert exported.dit is not None
    for part, network in (("vae", exported.vae), ("dit", exported.dit)):
        for name, value in network.state_dict().items():
            if name.startswith("encoder.final_layer"):
                continue  # says the fixed logSNR
            assert torch.equal(value, live[f"{part}.{name}"]), name
    copy = plain_copy(modules[-1], live, exported.tokenizer)
    sampler = SamplerConfig(max_new_tokens=8, num_steps=3)
    ours, theirs = (
        generate(exported, ["She was", ""], sampler),
        generate(copy, ["She was", ""], sampler),
    )
    for one, other in zip(ours, theirs, strict=True):
        assert one.token_ids == other.token_ids
        assert torch.equal(one.latents, other.latents)


def test_an_export_holds_one_file_at_a_time(
    vae_config: Callable[..., VAERunConfig], tmp_path: Path
) -> None:
    config = vae_config(
        "run",
        "vae.dim=64",
        "vae.ffn_dim=512",
        "vae.decoder_num_blocks=24",
        "trainer.max_steps=1",
        "trainer.validate_every_steps=0",
    )
    train(config)
    exported = load_file(folder_of(config) / "hf" / "cola_dlm" / "cola_vae" / "model.safetensors")
    whole = sum(tensor.nbytes for tensor in exported.values())
    per_file = whole / 10
    save, peak = tensor_files.save_file, {}
    for name, limit in (("files", per_file), ("one", whole)):
        held: list[int] = []

        def measured(
            tensors: dict[str, torch.Tensor], *rest: Any, held: list[int] = held, **more: Any
        ) -> None:
            held.append(sum(tensor.nbytes for tensor in tensors.values()))
            save(tensors, *rest, **more)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tensor_files, "save_file", measured)
            assert (
                main(
                    [
                        "export",
                        str(folder_of(config)),
                        "--out",
                        str(tmp_path / name),
                        "--max-shard-gb",
                        str(limit / 1e9),
                    ]
                )
                == 0
            )
        peak[name] = max(held)
    assert peak["files"] <= per_file
    assert peak["one"] == whole
    assert len(list((tmp_path / "files" / "cola_dlm" / "cola_vae").glob("*.safetensors"))) > 9
    one, files = ColaCheckpoint.load(tmp_path / "one"), ColaCheckpoint.load(tmp_path / "files")
    assert all(
        torch.equal(value, one.vae.state_dict()[name])
        for name, value in files.vae.state_dict().items()
    )


# Warm starts.


def test_a_warm_start_takes_weights_alone_and_never_happens_by_accident(
    joint_config: Callable[..., JointRunConfig],
    vae_config: Callable[..., VAERunConfig],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    old = joint_config("old", "trainer.validate_every_steps=1")
    train(old)
    new = tmp_path / "new.yaml"
    new.write_text(
        to_yaml(
            joint_config(
                "new",
                "optim.learning_rate=1e-3",
                "trainer.max_steps=2",
                "trainer.validate_every_steps=1",
                "optim.start_learning_rate=1e-30",
                "optim.weight_decay=0",
            )
        )
    )
    assert main(["warm-start", str(folder_of(old)), str(new)]) == 0
    run = tmp_path / "new"
    # Its first step, at no learning rate, leaves the old run's last weights; its samples, noise and
    # schedule begin anew.
    assert figures(run)[1, "validation/loss"] == figures(folder_of(old))[6, "validation/loss"]
    assert figures(run)[1, "train/learning_rate"] == 1e-30
    assert f"warm_start_from: {folder_of(old)}" in (run / "config.yaml").read_text()
    # The same command again goes on, as ever; by another verb the key is refused.
    assert main(["warm-start", str(folder_of(old)), str(new), "trainer.max_steps=3"]) == 0
    assert figures(run)[3, "train/loss"]
    assert main(["joint", str(run / "config.yaml"), "name=other"]) == 2
    assert (
        "is not set by hand, so that no run begins from another by accident"
        in capsys.readouterr().err
    )
    assert main(["joint", str(run / "config.yaml"), "trainer.max_steps=4"]) == 0
    other = tmp_path / "vae.yaml"
    other.write_text(to_yaml(vae_config("v")))
    assert main(["warm-start", str(folder_of(old)), str(other)]) == 2
    assert main(["warm-start", str(tmp_path / "none"), str(new)]) == 2
    wide = ["name=wide", "vae.dim=32"]
    assert main(["warm-start", str(folder_of(old)), str(new), *wide]) == 2
    assert (
        "model.vae.encoder.wte.weight: shape (321, 16), the run needs (321, 32)"
        in capsys.readouterr().err
    )


# Far into a large run.


def test_a_step_in_a_million_of_a_billion_rows_is_found_at_once(
    prepared_folder: Path, tmp_path: Path, vae_config: Any
) -> None:
    rows, seq_len, step, batch = 10**9, 32, 10**6, 1408
    folder = tmp_path / "large"
    shutil.copytree(prepared_folder, folder)
    values = json.loads((folder / MANIFEST_FILE).read_text())
    values["splits"][TRAIN] |= {"num_rows": rows, "num_documents": rows}
    del values["xxh3"]
    values["format_version"] = 1  # whose rows have no checksums
    # Sparse files take no room: a row of zeros each, and as many documents, which all begin at 0.
    sizes = {
        tokens_file(TRAIN): rows * seq_len * np.dtype(values["token_dtype"]).itemsize,
        documents_file(TRAIN): rows * 8,
    }
    for name, size in sizes.items():
        values["files"][name] = size
        (folder / name).write_bytes(b"")
        os.truncate(folder / name, size)
    (folder / MANIFEST_FILE).write_text(json.dumps(values))
    data = vae_config("x", f"data.path={folder}").data
    started = time.perf_counter()
    module = RunData(
        data, global_batch_size=batch, micro_batch_size=8, validation_rows=5, data_seed=6198
    )
    module.start_step = step
    first = next(iter(module.train_loader(1, 2)))
    assert time.perf_counter() - started < 5
    positions = np.arange(step * batch + batch // 2, (step + 1) * batch)
    assert first.sample_index.tolist() == positions.tolist()
    assert first.row_index.tolist() == row_index(positions, rows, 6198).tolist()
