"""Memory before a run is launched: against what a real run takes, by hand, by trying every size,
and by recording directly.
"""

import dataclasses
import lzma
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from cola_train.config.data import CorpusConfig, PrepareConfig
from cola_train.config.load import load_config
from cola_train.config.run import RunConfig
from cola_train.config.settings import UserError
from cola_train.data.prepare import prepare
from cola_train.families.autoregressive.family import AutoregressiveRunConfig
from cola_train.families.cola.config import JointRunConfig, VAERunConfig
from cola_train.families.masked_diffusion.family import LLaDARunConfig
from cola_train.models.text_vae import TextVAE
from cola_train.scaling.allocations import AllocationLog, MemoryPart, Timeline
from cola_train.scaling.memory import estimate, what_fits
from cola_train.scaling.recording import RecordingMode
from tests.helpers.programs import ROOT, clean_environment
from tests.helpers.runs import BOOK, SMALL, SMALL_DIT

SCRATCH = ["objective.reference_weight=0"]
TRANSFORMER = [
    "data.seq_len=32",
    "transformer.vocab_size=320",
    "transformer.hidden_size=16",
    "transformer.intermediate_size=32",
    "transformer.num_hidden_layers=1",
    "transformer.num_attention_heads=2",
    "transformer.head_dim=8",
    "trainer.global_batch_size=4",
    "trainer.micro_batch_size=4",
]


def small_vae(*overrides: str) -> VAERunConfig:
    return load_config(VAERunConfig, None, [*SMALL, "name=vae", "data.path=none", *overrides])


def small_joint(*overrides: str) -> JointRunConfig:
    return load_config(
        JointRunConfig,
        None,
        [*SMALL, *SMALL_DIT, "name=joint", "data.path=none", *SCRATCH, *overrides],
    )


@pytest.fixture(scope="module")
def long_rows(prepared_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of 128 tokens."""
    folder = tmp_path_factory.mktemp("long")
    (folder / "book.txt").write_bytes(lzma.decompress(BOOK.read_bytes())[:60_000])
    corpus, tokenizer = (
        CorpusConfig(inputs=[str(folder / "book.txt")]),
        str(prepared_folder / "tokenizer.json"),
    )
    prepare(
        PrepareConfig(
            out=str(folder / "rows"),
            tokenizer=tokenizer,
            corpus=corpus,
            seq_len=128,
            held_out_share=0,
        )
    )
    return folder / "rows"


# By what takes most of the memory.
MEASURED: dict[str, tuple[type[RunConfig], list[str]]] = {
    # Two micro-batches: whole gradients are added up between them.
    "weights": (
        VAERunConfig,
        [
            "vae.dim=384",
            "vae.ffn_dim=1536",
            "vae.num_heads=6",
            "vae.encoder_num_blocks=6",
            "vae.decoder_num_blocks=6",
            "trainer.micro_batch_size=1",
            "trainer.global_batch_size=2",
        ],
    ),
    "activations": (
        JointRunConfig,
        [
            *SMALL_DIT,
            *SCRATCH,
            "vae.dim=64",
            "vae.ffn_dim=256",
            "dit.txt_dim=128",
            "dit.emb_dim=128",
            "dit.heads=4",
            "dit.head_dim=32",
            "dit.rope_dim=16",
            "dit.num_layers=6",
            "trainer.micro_batch_size=8",
            "trainer.global_batch_size=8",
        ],
    ),
    "vocabulary": (
        VAERunConfig,
        [
            "vae.vocab_size=60000",
            "vae.dim=64",
            "vae.ffn_dim=128",
            "parallel.activation_checkpointing=full",
            "trainer.micro_batch_size=4",
            "trainer.global_batch_size=4",
        ],
    ),
}


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(),
    reason="reads the kernel's count of a process' memory",
)
@pytest.mark.parametrize("kind", MEASURED)
def test_a_real_run_takes_what_was_estimated(kind: str, long_rows: Path, tmp_path: Path) -> None:
    stage, overrides = MEASURED[kind]
    common = [
        *SMALL,
        "data.seq_len=128",
        f"data.path={long_rows}",
        f"runs_folder={tmp_path}",
        "trainer.max_steps=2",
        "trainer.validate_every_steps=0",
    ]
    config = load_config(stage, None, [*common, *overrides, "name=run"])
    networks = [*SMALL_DIT, *SCRATCH] if stage is JointRunConfig else []
    kept = f"parallel.activation_checkpointing={config.parallel.activation_checkpointing}"
    warm_up = load_config(stage, None, [*common, *networks, kept, "name=warm_up"])
    files = []
    for each in (config, warm_up):
        files.append(tmp_path / f"{each.name}.yaml")
        files[-1].write_text(yaml.safe_dump(dataclasses.asdict(each)))
    # What is released goes back to the system, as glibc does it only for large blocks otherwise.
    environment = {**clean_environment(), "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", "tests.scaling.measured_run", *map(str, files)]
    run = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    measured = int(run.stdout.rsplit("grew ", 1)[1])
    assert measured > 100e6
    assert estimate(config, world_size=1).peak == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("processes", [1, 3])
def test_persistent_parts_are_what_the_shapes_say(processes: int) -> None:
    config = small_vae(f"trainer.global_batch_size={4 * processes}", "ema.decay=0.9")
    with torch.device("meta"):
        shapes = [parameter.shape for parameter in TextVAE(config.vae).parameters()]
    # FSDP2 cuts the first dimension into equal pieces; process 0 never has the short one.
    numbers = sum(-(-shape[0] // processes) * shape[1:].numel() for shape in shapes)
    by_part = estimate(config, processes).by_part
    assert by_part["weights"] == by_part["moving average of the weights"] == 4 * numbers
    # Two moments, and a step count of each parameter.
    assert by_part["optimizer state"] == 2 * 4 * numbers + 4 * len(shapes)


def test_parts_add_up_to_the_peak_and_a_gpu_has_its_runtime_beside_them() -> None:
    on_cpu, on_gpu = estimate(small_joint(), 1), estimate(small_joint(), 1, device_type="cuda")
    for found in (on_cpu, on_gpu):
        assert sum(found.by_part.values()) == found.peak
    assert on_cpu.by_part["device runtime"] == 0
    assert on_gpu.by_part["device runtime"] > 1e9


def small_ar(*overrides: str) -> AutoregressiveRunConfig:
    return load_config(
        AutoregressiveRunConfig, None, ["name=ar", "data.path=none", *TRANSFORMER, *overrides]
    )


def small_llada(*overrides: str) -> LLaDARunConfig:
    return load_config(
        LLaDARunConfig, None, ["name=llada", "data.path=none", *TRANSFORMER, *overrides]
    )


@pytest.mark.parametrize(
    ("make", "device_type"),
    [(small_vae, "cpu"), (small_joint, "cuda"), (small_ar, "cuda"), (small_llada, "cpu")],
)
def test_the_more_is_computed_again_the_less_is_kept(
    make: Callable[..., RunConfig], device_type: Literal["cpu", "cuda"]
) -> None:
    def by_part(mode: str) -> dict[str, int]:
        return estimate(
            make(f"parallel.activation_checkpointing={mode}"), 1, device_type=device_type
        ).by_part

    none, full = by_part("none"), by_part("full")
    assert full["activations"] < none["activations"]
    assert full["weights"] == none["weights"]
    if make is small_joint:
        assert full["activations"] < by_part("selective")["activations"] < none["activations"]


def test_frozen_weights_have_no_gradients_and_no_optimizer_state() -> None:
    fix = estimate(small_joint("init_vae_from=some", "objective.vae_strategy.mode=fix"), 1).by_part
    joint = estimate(small_joint(), 1).by_part
    assert fix["weights"] == joint["weights"]
    assert fix["optimizer state"] < joint["optimizer state"]
    assert fix["vocabulary logits"] == 0


def test_offloaded_parts_are_not_the_gpus() -> None:
    config = small_vae("trainer.global_batch_size=8")
    offloaded = dataclasses.replace(
        config, parallel=dataclasses.replace(config.parallel, cpu_offload=True)
    )
    there, gone = (estimate(each, 2, device_type="cuda").by_part for each in (config, offloaded))
    assert there["weights"] > 0
    assert there["optimizer state"] > 0
    assert gone["weights"] == gone["gradients"] == gone["optimizer state"] == 0
    assert gone["activations"] == there["activations"]


def test_the_largest_micro_batch_is_what_trying_all_finds() -> None:
    devices, local_rows = 2, 12
    sizes = [rows for rows in range(1, local_rows + 1) if local_rows % rows == 0]
    configs = {
        rows: small_vae(
            f"trainer.global_batch_size={devices * local_rows}", f"trainer.micro_batch_size={rows}"
        )
        for rows in sizes
    }
    peaks = {rows: estimate(config, devices).peak for rows, config in configs.items()}
    for memory in [size for peak in peaks.values() for size in (peak - 1, peak)]:
        by_trying = max((rows for rows in sizes if peaks[rows] <= memory), default=0)
        (option, *_) = what_fits(configs[1], devices, memory, device_type="cpu")
        assert (option.strategy, option.activation_checkpointing) == ("fsdp2", "none")
        assert option.micro_batch_size == by_trying


def test_what_fits_agrees_with_estimates_of_each_sharding() -> None:
    config = small_vae("trainer.global_batch_size=16", "vae.dim=64", "vae.ffn_dim=128")
    memory = estimate(config, 4, 2).peak
    options = what_fits(config, 4, memory, local_world_size=2, device_type="cpu")
    assert [option.strategy for option in options[::3]] == ["fsdp2", "hsdp", "ddp"]
    for option in options[3::3]:  # fsdp2 is what they are derived from
        parallel = dataclasses.replace(config.parallel, strategy=option.strategy)
        trainer = dataclasses.replace(config.trainer, micro_batch_size=option.micro_batch_size or 1)
        direct = estimate(dataclasses.replace(config, parallel=parallel, trainer=trainer), 4, 2)
        assert option.peak == pytest.approx(direct.peak, rel=0.05)
        assert (option.peak <= memory) == (option.micro_batch_size > 0)


def test_nothing_fits_into_too_small_a_device() -> None:
    options = what_fits(small_vae(), 1, device_bytes=1000, device_type="cpu")
    assert [(option.strategy, option.micro_batch_size) for option in options] == [("fsdp2", 0)] * 3
    assert min(option.peak for option in options) > 1000


def test_a_batch_that_does_not_divide_among_the_devices_is_refused() -> None:
    with pytest.raises(
        UserError,
        match=r"global_batch_size \(4\) must be a multiple of the number of devices \(3\)",
    ):
        what_fits(small_vae(), 3, 10**9)
    with pytest.raises(
        UserError,
        match=(
            r"multiple of trainer.micro_batch_size x devices \(4 x 2 = 8\): choose one that "
            r"divides 2"
        ),
    ):
        estimate(small_vae(), 2)


def test_a_log_knows_allocations_views_resizing_and_release() -> None:
    mode, log = RecordingMode(), AllocationLog(vocab_size=7)
    with mode, mode.recording_to(log):
        weight = torch.zeros(100, 2)
        log.take(MemoryPart.WEIGHTS, [weight])
        logits = weight[:, :1].expand(-1, 7) + 1
        logits[0].zero_()
        log.take_rest(MemoryPart.ACTIVATIONS)
        weight.untyped_storage().resize_(0)
        del logits
    live = log.live()
    assert live[:, MemoryPart.WEIGHTS].tolist() == [800, 800, 0, 0]
    assert live[:, MemoryPart.LOGITS].tolist() == [0, 2800, 2800, 0]
    assert live.sum() == 800 + 3600 + 2800


@given(st.lists(st.integers(1, 50), min_size=1, max_size=6))
def test_sums_of_gradients_live_until_their_unit_is_reduced(units: list[int]) -> None:
    # One event a unit: its buffer replaces the one before, as its gradient does.
    fixed = torch.zeros(2 * len(units), len(MemoryPart), dtype=torch.int64).numpy()
    for number, size in enumerate(units):
        fixed[2 * number, MemoryPart.REDUCING] = size
    timeline = Timeline(fixed, fixed * 0).accumulating()
    whole = sum(units)
    for number, size in enumerate(units):
        before, last = timeline.fixed[2 * number], timeline.fixed[2 * (len(units) + number)]
        assert (before[MemoryPart.UNREDUCED], before[MemoryPart.REDUCING]) == (whole, 0)
        assert (last[MemoryPart.UNREDUCED], last[MemoryPart.REDUCING]) == (
            whole - sum(units[:number]),
            size,
        )
