"""The released layout: what goes out as it came in, and every kind of bad checkpoint refused with
its reason.
"""

import dataclasses
import json
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from cola_train import files, tensor_files
from cola_train.config.settings import UserError
from cola_train.families.cola import format as hf_format
from cola_train.families.cola.checkpoint import ColaCheckpoint
from cola_train.families.cola.format import DIT_FORMAT, VAE_FORMAT, find_root
from tests.helpers.golden import Golden
from tests.helpers.tiny import (
    DIT_CONFIG,
    VAE_CONFIG,
    random_tokens,
    tiny_checkpoint,
    tiny_dit,
    tiny_tokenizer,
    tiny_vae,
)

VAE, DIT = "cola_dlm/cola_vae", "cola_dlm/cola_dit"
WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
CHECKSUMS = "checksums.json"


def stored_tensors(folder: Path) -> dict[str, tuple[tuple[int, ...], bytes]]:
    """Shape and raw bytes of every tensor in a folder's safetensors files, which all must be
    fp32.
    """
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="np") as file:
            assert file.metadata() == {"format": "pt"}
            for name in file.keys():  # noqa: SIM118 - not a mapping
                assert name not in tensors
                assert file.get_slice(name).get_dtype() == "F32"
                tensor = file.get_tensor(name)
                tensors[name] = (tensor.shape, tensor.tobytes())
    return tensors


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def edit_json(path: Path, **changes: Any) -> None:
    path.with_name(CHECKSUMS).unlink(missing_ok=True)  # as other programs write it
    path.write_text(json.dumps({**read_json(path), **changes}), encoding="utf-8")


@pytest.fixture
def saved(checkpoint: ColaCheckpoint, tmp_path: Path) -> Path:
    """A good checkpoint on disk, for the test to damage."""
    folder = tmp_path / "saved"
    checkpoint.save(folder)
    return folder


def assert_refused(folder: Path, *reasons: str) -> str:
    """Loading fails with every one of `reasons`, plain text, in its message."""
    with pytest.raises(UserError) as caught:
        ColaCheckpoint.load(folder)
    for reason in reasons:
        assert reason in str(caught.value)
    return str(caught.value)


# Both ways


@pytest.mark.parametrize("max_shard_bytes", [tensor_files.DEFAULT_MAX_SHARD_BYTES, 200_000])
def test_golden_checkpoints_go_out_as_they_came_in(
    golden: Golden, tmp_path: Path, max_shard_bytes: int
) -> None:
    golden.checkpoint.save(tmp_path / "out", max_shard_bytes=max_shard_bytes)
    for network in (VAE, DIT):
        ours, theirs = tmp_path / "out" / network, golden.folder / network
        assert stored_tensors(ours) == stored_tensors(theirs)
        fields = read_json(theirs / CONFIG)
        fields.pop("transformers_version")
        assert read_json(ours / CONFIG) == {**fields, "torch_dtype": "float32"}
        sharded = max_shard_bytes == 200_000
        assert (ours / INDEX).exists() == sharded
        assert (ours / WEIGHTS).exists() != sharded
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (
        golden.folder / "tokenizer.json"
    ).read_bytes()
    again = ColaCheckpoint.load(tmp_path / "out")
    assert golden.checkpoint.dit is not None
    assert again.dit is not None
    assert (again.vae.config, again.dit.config) == (
        golden.checkpoint.vae.config,
        golden.checkpoint.dit.config,
    )
    tokens = golden.train["tokens"]
    assert torch.equal(again.vae.encode(tokens).mean, golden.checkpoint.vae.encode(tokens).mean)


def test_sharded_files_are_named_counted_and_complete(
    checkpoint: ColaCheckpoint, tmp_path: Path
) -> None:
    checkpoint.save(tmp_path / "one")
    checkpoint.save(tmp_path / "many", max_shard_bytes=3000)
    for network in (VAE, DIT):
        one, many = tmp_path / "one" / network, tmp_path / "many" / network
        whole = stored_tensors(one)
        assert stored_tensors(many) == whole
        index = read_json(many / INDEX)
        shards = sorted(path.name for path in many.glob("*.safetensors"))
        assert len(shards) > 2
        assert shards == [
            f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)
        ]
        assert index["metadata"] == {"total_size": sum(len(data) for _, data in whole.values())}
        for name, shard in index["weight_map"].items():
            assert name in load_file(many / shard)
        assert index["weight_map"].keys() == whole.keys()
        for shard in shards:
            tensors = load_file(many / shard)
            # A tensor larger than the limit has a file of its own.
            assert len(tensors) == 1 or sum(t.numel() * 4 for t in tensors.values()) <= 3000
    reloaded, plain = ColaCheckpoint.load(tmp_path / "many"), ColaCheckpoint.load(tmp_path / "one")
    tokens = random_tokens(1, 8, seed=1)
    assert torch.equal(reloaded.vae.encode(tokens).mean, plain.vae.encode(tokens).mean)


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_files_have_the_modes_that_the_umask_leaves(
    umask: int, checkpoint: ColaCheckpoint, tmp_path: Path
) -> None:
    before = os.umask(umask)
    try:
        checkpoint.save(tmp_path / "out")
    finally:
        os.umask(before)
    for path in (tmp_path / "out").rglob("*"):
        usual = 0o777 if path.is_dir() else 0o666
        assert stat.S_IMODE(path.stat().st_mode) == usual & ~umask, path


def test_what_is_loaded_is_what_was_saved_and_ready_for_inference(
    checkpoint: ColaCheckpoint, tmp_path: Path
) -> None:
    checkpoint.training = {"stage": 2, "step": 30, "seq_len": 64}
    checkpoint.save(tmp_path / "out")
    loaded = ColaCheckpoint.load(tmp_path / "out")
    assert loaded.training == checkpoint.training
    assert loaded.trained_seq_len == 64
    assert loaded.tokenizer.content == checkpoint.tokenizer.content
    for ours, theirs in ((checkpoint.vae, loaded.vae), (checkpoint.dit, loaded.dit)):
        assert ours is not None
        assert theirs is not None
        assert ours.config == theirs.config
        assert ours.state_dict().keys() == theirs.state_dict().keys()
        assert all(
            torch.equal(value, theirs.state_dict()[name])
            for name, value in ours.state_dict().items()
        )
        assert not theirs.training
        assert not any(parameter.requires_grad for parameter in theirs.parameters())


def test_a_stage_1_checkpoint_has_no_dit(tmp_path: Path) -> None:
    tiny_checkpoint(tiny_vae(), None).save(tmp_path / "out")
    assert not (tmp_path / "out" / DIT).exists()
    loaded = ColaCheckpoint.load(tmp_path / "out")
    assert loaded.dit is None
    assert loaded.training == {}
    assert loaded.trained_seq_len is None
    with pytest.raises(
        UserError, match=r"has no cola_dlm/cola_dit; a checkpoint of stage 1 holds the VAE only"
    ):
        DIT_FORMAT.tensors(tmp_path / "out", DIT_CONFIG)


def test_weights_of_another_precision_load_as_fp32(saved: Path) -> None:
    path = saved / VAE / WEIGHTS
    tensors = load_file(path)
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, path)
    (saved / VAE / CHECKSUMS).unlink()
    loaded = ColaCheckpoint.load(saved).vae.state_dict()
    assert all(
        torch.equal(loaded[name], tensor.bfloat16().float()) for name, tensor in tensors.items()
    )
    assert not all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_fields_that_are_absent_take_the_formats_defaults(saved: Path) -> None:
    fields = read_json(saved / DIT / CONFIG)
    assert fields.pop("norm_eps") == 1e-5
    (saved / DIT / CHECKSUMS).unlink()
    (saved / DIT / CONFIG).write_text(json.dumps(fields), encoding="utf-8")
    loaded = ColaCheckpoint.load(saved)
    assert loaded.dit is not None
    assert loaded.dit.config.norm_eps == 1e-5


def test_a_run_folder_stands_for_its_export(checkpoint: ColaCheckpoint, tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "run" / "hf")
    assert find_root(tmp_path / "run") == tmp_path / "run" / "hf"
    assert ColaCheckpoint.load(tmp_path / "run").vae.config == checkpoint.vae.config


@pytest.mark.parametrize(("scale", "shift"), [(2.0, 0.0), (1.0, 0.5)])
def test_exporting_other_scaling_factors_warns(tmp_path: Path, scale: float, shift: float) -> None:
    checkpoint = tiny_checkpoint(tiny_vae(scaling_factor=scale, shifting_factor=shift), None)
    with pytest.warns(
        UserWarning,
        match=rf"scaling_factor {scale} and shifting_factor {shift}.*released sampler.*wrong text",
    ):
        checkpoint.save(tmp_path / "out")
    assert ColaCheckpoint.load(tmp_path / "out").vae.config.scaling_factor == scale


# Loading into a network of one's own


def test_the_tensors_of_a_folder_are_read_in_turn(saved: Path, checkpoint: ColaCheckpoint) -> None:
    for tensors, original in (
        (VAE_FORMAT.tensors(saved, VAE_CONFIG), checkpoint.vae),
        (DIT_FORMAT.tensors(saved, DIT_CONFIG), checkpoint.dit),
    ):
        assert original is not None
        read = dict(tensors)
        assert read.keys() == original.state_dict().keys()
        assert all(torch.equal(value, original.state_dict()[name]) for name, value in read.items())


def test_networks_of_another_configuration_are_refused_by_field(saved: Path) -> None:
    with pytest.raises(
        UserError,
        match=r"vae\.dim: checkpoint 16, config 32, vae\.block_size: checkpoint 1, config 2",
    ):
        VAE_FORMAT.tensors(saved, dataclasses.replace(VAE_CONFIG, dim=32, block_size=2))
    with pytest.raises(
        UserError, match=r"dit\.rope_dim: checkpoint 6, config 4\). Set the config's values"
    ):
        DIT_FORMAT.tensors(saved, dataclasses.replace(DIT_CONFIG, rope_dim=4))
    # How weights were once drawn says nothing about the network.
    assert dict(VAE_FORMAT.tensors(saved, dataclasses.replace(VAE_CONFIG, init_std=0.5)))


def test_a_dit_may_go_on_with_blocks_of_another_size(
    saved: Path, checkpoint: ColaCheckpoint
) -> None:
    assert checkpoint.dit is not None
    one = dataclasses.replace(DIT_CONFIG, block_size=1)
    assert checkpoint.dit.config.block_size != 1
    read = dict(DIT_FORMAT.tensors(saved, one))
    assert read.keys() == checkpoint.dit.state_dict().keys()
    assert all(torch.equal(read[name], it) for name, it in checkpoint.dit.state_dict().items())


# Bad checkpoints


def test_every_tensor_that_does_not_fit_is_named_at_once(saved: Path) -> None:
    path = saved / VAE / WEIGHTS
    tensors = load_file(path)
    del tensors["encoder.wte.weight"]
    del tensors["decoder.final_norm.bias"]
    tensors["decoder.in_layer.weight"] = tensors["decoder.in_layer.weight"][:, :3].contiguous()
    tensors["decoder.extra"] = torch.zeros(2)
    save_file(tensors, path)
    message = assert_refused(saved, f"The tensors in {saved / VAE} do not fit its config.json")
    problems = {line.strip() for line in message.splitlines()[1:]}
    assert problems == {
        "encoder.wte.weight: missing",
        "decoder.final_norm.bias: missing",
        "decoder.in_layer.weight: shape (16, 3), the config needs (16, 4)",
        "decoder.extra: unexpected",
    }


@pytest.mark.parametrize("kind", [torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn])
def test_weights_that_are_no_numbers_of_use_are_named(saved: Path, kind: torch.dtype) -> None:
    path = saved / VAE / WEIGHTS
    tensors = load_file(path)
    save_file({**tensors, "decoder.final_norm.bias": torch.zeros(16).to(kind)}, path)
    assert_refused(saved, "decoder.final_norm.bias: type ", "weights are F32, F16, BF16, F64")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_named(saved: Path, value: float) -> None:
    path = saved / DIT / WEIGHTS
    tensors = load_file(path)
    tensors["txt_out.proj.bias"][1:3] = value
    save_file(tensors, path)
    (saved / DIT / CHECKSUMS).unlink()
    assert_refused(saved, f"{path}: txt_out.proj.bias has 2 of ", "that are not finite")
    with pytest.raises(UserError, match=r"txt_out\.proj\.bias has 2 of "):
        dict(DIT_FORMAT.tensors(saved, DIT_CONFIG))


@pytest.mark.parametrize("max_shard_bytes", [3000, 10**9])
def test_every_bit_of_the_weights_is_checked(
    checkpoint: ColaCheckpoint, tmp_path: Path, max_shard_bytes: int
) -> None:
    checkpoint.save(tmp_path / "out", max_shard_bytes=max_shard_bytes)
    ColaCheckpoint.load(tmp_path / "out")
    for path in (tmp_path / "out").rglob("*.safetensors"):
        whole = path.read_bytes()
        start = 8 + int.from_bytes(whole[:8], "little")
        for place in (start, (start + len(whole)) // 2, len(whole) - 1):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            assert_refused(tmp_path / "out", f"{path.name} has been altered", "export")
        path.write_bytes(whole)
    ColaCheckpoint.load(tmp_path / "out")


@pytest.mark.parametrize(
    "name", [f"{VAE}/{CONFIG}", f"{DIT}/{CONFIG}", "tokenizer.json", "training.json"]
)
def test_every_byte_beside_the_weights_is_checked(
    checkpoint: ColaCheckpoint, tmp_path: Path, name: str
) -> None:
    checkpoint.training = {"seq_len": 64, "mask_documents": True}
    checkpoint.save(tmp_path / "out")
    path = tmp_path / "out" / name
    whole = path.read_bytes()
    for place in range(0, len(whole), 1 + len(whole) // 9):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert_refused(tmp_path / "out", path.name)
    path.unlink()
    assert_refused(tmp_path / "out", f"{path.name}", "missing")
    path.write_bytes(whole)
    ColaCheckpoint.load(tmp_path / "out")


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"encoder_num_blocks": 10**9}, "says 1,000,000,002 blocks, and the weights beside it are"),
        ({"vocab_size": 10**9}, "the config needs (1000000000, 16)"),
        ({"vocab_size": 2**62}, "describes no network that can be built"),
    ],
)
def test_a_config_of_absurd_size_takes_no_memory(
    saved: Path, changes: dict[str, int], reason: str
) -> None:
    edit_json(saved / VAE / CONFIG, **changes)
    assert_refused(saved, reason)


@pytest.mark.parametrize("text", ["{}", '{"model.safetensors": 3}', "{", "[]", '{"a": {}}'])
def test_checksums_that_are_damaged_are_named(saved: Path, text: str) -> None:
    (saved / VAE / CHECKSUMS).write_text(text)
    assert_refused(saved, f"{saved / VAE / CHECKSUMS} ", "export the checkpoint again")


def test_that_weights_cannot_be_checked_is_said_once(
    saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ColaCheckpoint.load(saved)
    assert capsys.readouterr().err == ""
    (saved / DIT / CHECKSUMS).unlink()
    ColaCheckpoint.load(saved)
    ColaCheckpoint.load(saved)
    assert capsys.readouterr().err == (
        f"{saved / DIT / WEIGHTS} has no checksums.json beside it, which exports of this program "
        "have: whether it is as it was written cannot be checked.\n"
    )


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickled_weights_are_named_and_never_read(saved: Path, tmp_path: Path, name: str) -> None:
    (saved / VAE / WEIGHTS).rename(saved / VAE / name)
    assert_refused(saved, f"has neither {WEIGHTS}", f"{name} is of Python's pickle")
    for place in (saved / VAE / name, saved / VAE):
        with pytest.raises(UserError, match=rf"{name} is of Python's pickle, which can run any"):
            find_root(place)
    with pytest.raises(UserError, match="is a file, so it has no cola_dlm"):
        find_root(saved / VAE / name)


def test_files_that_git_lfs_left_out_are_named_for_what_they_are(saved: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    for name in (f"{VAE}/{WEIGHTS}", f"{DIT}/{CONFIG}", "tokenizer.json"):
        whole = (saved / name).read_bytes()
        (saved / name).write_text(pointer)
        assert_refused(saved, f"{saved / name} ", "Git LFS pointer", "git lfs pull")
        (saved / name).write_bytes(whole)
    ColaCheckpoint.load(saved)


def test_a_tensor_in_two_files_is_named(checkpoint: ColaCheckpoint, tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "many", max_shard_bytes=3000)
    first, second = sorted((tmp_path / "many" / VAE).glob("*.safetensors"))[:2]
    name, tensor = next(iter(load_file(first).items()))
    save_file({**load_file(second), name: tensor}, second)
    assert_refused(tmp_path / "many", f"{name}: in two files")


def test_a_header_that_is_garbage(saved: Path) -> None:
    path = saved / VAE / WEIGHTS
    whole = path.read_bytes()
    for header in (b"\xff" * 8, b"{" * 8, whole[:8][::-1]):
        path.write_bytes(header + whole[8:])
        assert_refused(saved, f"{path} is corrupt or truncated")
    path.write_bytes(whole[:8] + b"\0" * 40 + whole[48:])
    assert_refused(saved, f"{path} is corrupt or truncated")


def test_what_the_safetensors_library_cannot_write_is_told(
    checkpoint: ColaCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(tensor_files, "save_file", full)
    with pytest.raises(UserError, match=r"Cannot write .*out: I/O error: No space left"):
        checkpoint.save(tmp_path / "out")
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
@pytest.mark.parametrize("network", [VAE, DIT])
def test_a_truncated_file(saved: Path, network: str, kept: int) -> None:
    path = saved / network / WEIGHTS
    path.write_bytes(path.read_bytes()[:kept])
    assert_refused(saved, f"{path} is corrupt or truncated", "copy or export the checkpoint again")


def test_no_weights_and_lost_shards(
    checkpoint: ColaCheckpoint, saved: Path, tmp_path: Path
) -> None:
    (saved / DIT / WEIGHTS).unlink()
    assert_refused(saved, f"{saved / DIT} has neither {WEIGHTS} nor {INDEX}")
    checkpoint.save(tmp_path / "many", max_shard_bytes=3000)
    first = next((tmp_path / "many" / VAE).glob("model-00001-*"))
    first.unlink()
    assert_refused(tmp_path / "many", f"{first} is missing though {INDEX} names it")


@pytest.mark.parametrize("weight_map", [None, [], {"a": 3}, {"a": "../elsewhere.safetensors"}])
def test_an_index_that_names_no_files(saved: Path, weight_map: Any) -> None:
    (saved / VAE / WEIGHTS).unlink()
    (saved / VAE / INDEX).write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    assert_refused(saved, f"{saved / VAE / INDEX} has no usable weight_map")


@pytest.mark.parametrize("network", [VAE, DIT])
def test_config_files_missing_or_unreadable(saved: Path, network: str) -> None:
    path = saved / network / CONFIG
    path.write_text("{", encoding="utf-8")
    assert_refused(saved, f"{path} is not valid JSON")
    path.write_text("[]", encoding="utf-8")
    assert_refused(saved, f"{path} must hold an object of fields, not a list")
    path.unlink()
    assert_refused(saved, f"{path} is missing; the checkpoint is incomplete")


@pytest.mark.parametrize(
    ("network", "field", "message"),
    [
        (VAE, {"laten_dim": 4}, "unknown field 'laten_dim'; did you mean 'latent_dim'?"),
        (DIT, {"num_layer": 2}, "unknown field 'num_layer'; did you mean 'num_layers'?"),
        (VAE, {"zzz": 1}, "unknown field 'zzz'; allowed: act, attn_dropout"),
        (VAE, {"dim": "16"}, "field 'dim' must be of type"),
        (VAE, {"dim": True}, "field 'dim' must be of type"),
        (VAE, {"qk_norm": 1}, "field 'qk_norm' must be of type"),
        (VAE, {"clip_qkv": "8"}, "field 'clip_qkv' must be of type"),
        (DIT, {"heads": 2.0}, "field 'heads' must be of type"),
        (DIT, {"block_size": None}, "field 'block_size' must be of type"),
        (
            VAE,
            {"shared_heads_kv": 2},
            (
                "TextVAEConfig.shared_heads_kv = 2 is not supported: the released code cannot run "
                "grouped"
            ),
        ),
        (
            VAE,
            {"block_causal": False},
            (
                "block_causal = False is not supported: without it the released code attends "
                "across samples"
            ),
        ),
        (
            VAE,
            {"encoder_last_ln": False},
            "encoder_last_ln = False is not supported: the method needs E[mu^2] = 1",
        ),
        (VAE, {"layer_norm_type": "rms"}, "layer_norm_type = 'rms' is not supported"),
        (VAE, {"rope_full_precision": False}, "rope_full_precision = False is not supported"),
        (VAE, {"dropout": 0.1}, "dropout = 0.1 is not supported"),
        (VAE, {"attn_dropout": 0.1}, "attn_dropout = 0.1 is not supported"),
        (VAE, {"act": "gelu"}, "act = 'gelu' is not supported"),
        (VAE, {"init_fn": "uniform"}, "init_fn = 'uniform' is not supported"),
        (
            VAE,
            {"use_variation": False},
            "use_variation = False is not supported: the posterior needs a variance",
        ),
        (
            VAE,
            {"scaling_factor": 0},
            "TextVAEConfig.scaling_factor must be a finite number other than 0, not 0",
        ),
        (
            VAE,
            {"num_heads": 3},
            "TextVAEConfig.dim (16) must be a multiple of 2 x num_heads (3) for RoPE",
        ),
        (VAE, {"ffn_dim": 25}, "TextVAEConfig.ffn_dim must be even"),
        (
            VAE,
            {"decoder_num_blocks": 0},
            "TextVAEConfig.decoder_num_blocks must be at least 1, not 0",
        ),
        (
            DIT,
            {"patch_size": 2},
            (
                "DiTConfig.patch_size = 2 is not supported: the released code crashes on other "
                "patch sizes. Use 1"
            ),
        ),
        (
            DIT,
            {"emb_dim": 32},
            (
                "DiTConfig.emb_dim = 32 is not supported: the released blocks need emb_dim equal "
                "to txt_dim. Use 16"
            ),
        ),
        (
            DIT,
            {"txt_out_channels": 8},
            "DiTConfig.txt_out_channels = 8 is not supported: a velocity has the latent's shape",
        ),
        (DIT, {"rope_dim": 10}, "DiTConfig.rope_dim must be even and in 2..head_dim (8), not 10"),
        (DIT, {"rope_dim": 3}, "DiTConfig.rope_dim must be even and in 2..head_dim (8), not 3"),
        (DIT, {"num_layers": 0}, "DiTConfig.num_layers must be at least 1, not 0"),
    ],
    ids=str,
)
def test_fields_that_are_unknown_or_unsupported(
    saved: Path, network: str, field: dict[str, Any], message: str
) -> None:
    edit_json(saved / network / CONFIG, **field)
    assert_refused(saved, message)


@pytest.mark.parametrize(
    "field",
    [{"clip_qkv": 8}, {"clip_qkv": 8.0}, {"clip_qkv": None}, {"scaling_factor": 1}],
    ids=str,
)
def test_whole_numbers_are_floats_too(saved: Path, field: dict[str, Any]) -> None:
    edit_json(saved / VAE / CONFIG, **field)
    (name, value), config = *field.items(), ColaCheckpoint.load(saved).vae.config
    assert getattr(config, name) == value


def test_fields_that_are_read_and_ignored(saved: Path) -> None:
    edit_json(saved / VAE / CONFIG, causal=True, use_emb=False, transformers_version="9")
    assert ColaCheckpoint.load(saved).vae.config.causal is True


def test_a_pair_that_cannot_work_together(tmp_path: Path) -> None:
    tiny_checkpoint(tiny_vae(), tiny_dit(txt_in_channels=6, txt_out_channels=6)).save(
        tmp_path / "channels"
    )
    assert_refused(tmp_path / "channels", "dit.txt_in_channels (6) must equal vae.latent_dim (4)")
    tiny_checkpoint(tiny_vae(block_size=3), tiny_dit()).save(tmp_path / "blocks")
    assert_refused(tmp_path / "blocks", "vae.block_size (3) must divide dit.block_size (4)")


def test_a_tokenizer_that_does_not_fit(saved: Path) -> None:
    path = saved / "tokenizer.json"
    (saved / CHECKSUMS).unlink()
    path.write_bytes(tiny_tokenizer(30).content)
    assert_refused(
        saved, f"{saved}: the tokenizer has 30 ids, the VAE only 29", "put the tokenizer.json there"
    )
    path.write_bytes(tiny_tokenizer(20).content)  # an embedding may have rows to spare
    assert ColaCheckpoint.load(saved).tokenizer.vocab_size == 20
    path.unlink()
    assert_refused(saved, f"There is no tokenizer file {path}")


def test_folders_that_hold_no_checkpoint(tmp_path: Path) -> None:
    assert_refused(
        tmp_path,
        f"{tmp_path} has no cola_dlm/cola_vae (nor hf/cola_dlm/cola_vae)",
        "cola-train export RUN",
    )
    assert_refused(
        tmp_path / "nowhere",
        f"{tmp_path / 'nowhere'} does not exist, so it has no cola_dlm/cola_vae",
    )


# Writing


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_what_exists_is_not_overwritten_unasked(saved: Path) -> None:
    before = contents(saved)
    with pytest.raises(UserError, match=rf"{re.escape(str(saved))} exists and is not overwritten"):
        tiny_checkpoint(tiny_vae(seed=5), None).save(saved)
    assert contents(saved) == before
    tiny_checkpoint(tiny_vae(seed=5), None).save(saved, replace=True)
    assert ColaCheckpoint.load(saved).dit is None
    assert [path.name for path in saved.parent.iterdir()] == ["saved"]


def fail_at_the_tokenizer(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(self: object, path: Path) -> None:
        assert (path.parent / VAE / WEIGHTS).exists()  # half of the work is done
        raise error

    monkeypatch.setattr(hf_format.Tokenizer, "save", fail)


def fail_at_the_swap(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def failing(real: Callable[[Path, Path], Any]) -> Callable[[Path, Path], Any]:
        return lambda working, final: real(working / "nowhere", final)

    for name in ("_swap_in", "_move_to_new"):  # what replaces, and what may not
        monkeypatch.setattr(files, name, failing(getattr(files, name)))


@pytest.mark.parametrize("break_at", [fail_at_the_tokenizer, fail_at_the_swap])
@pytest.mark.parametrize("existing", [False, True])
def test_a_failing_write_changes_nothing(
    saved: Path,
    checkpoint: ColaCheckpoint,
    monkeypatch: pytest.MonkeyPatch,
    break_at: Callable[[pytest.MonkeyPatch, Exception], None],
    existing: bool,
) -> None:
    target = saved if existing else saved.parent / "new"
    before = contents(saved.parent)
    break_at(monkeypatch, OSError(28, "No space left on device"))
    with pytest.raises(
        UserError, match=rf"Cannot write {re.escape(str(target))}: .*Nothing was changed there"
    ):
        checkpoint.save(target, replace=existing)
    assert contents(saved.parent) == before
    assert [path.name for path in saved.parent.iterdir()] == ["saved"]


def test_an_interrupted_write_changes_nothing(
    saved: Path, checkpoint: ColaCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tensor_files, "save_file", interrupt)
    before = contents(saved.parent)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(saved, replace=True)
    assert contents(saved.parent) == before


def test_every_config_field_is_written(saved: Path, checkpoint: ColaCheckpoint) -> None:
    assert checkpoint.dit is not None
    extra = {"dtype": "float32", "torch_dtype": "float32"}
    for network, config, architecture, model_type in (
        (VAE, checkpoint.vae.config, "ColaTextVAEModel", "cola_text_vae"),
        (DIT, checkpoint.dit.config, "ColaDiTModel", "cola_dit"),
    ):
        # The released layout has no names for a codebook.
        own = ("head", "vocab_size", "embeds_codes") if network == DIT else ()
        expected = {
            **{key: value for key, value in dataclasses.asdict(config).items() if key not in own},
            "architectures": [architecture],
            "model_type": model_type,
            **extra,
        }
        assert read_json(saved / network / CONFIG) == expected
