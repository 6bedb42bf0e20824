"""A dry run: one recording says what two say, one stage what several, few layers what all do."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from cola_train.config.run import RunConfig
from cola_train.scaling import dry_run, layers, memory
from cola_train.scaling.allocations import AllocationLog, Timeline
from cola_train.scaling.dry_run import record
from cola_train.scaling.plan import Fleet, make_plan
from cola_train.scaling.recording import RecordingMode
from cola_train.training.parallel.blocks import Checkpointing
from tests.scaling.test_memory import small_ar, small_joint, small_llada, small_vae

KINDS: tuple[Checkpointing, ...] = ("none", "selective", "full")


def same(found: Timeline, expected: Timeline) -> bool:
    return np.array_equal(found.fixed, expected.fixed) and np.array_equal(
        found.per_row, expected.per_row
    )


def counted_calls(monkeypatch: pytest.MonkeyPatch, *names: str) -> dict[str, int]:
    """How often functions of dry_run are called from now on."""
    calls = dict.fromkeys(names, 0)

    def counted(name: str) -> Callable[..., Any]:
        real = getattr(dry_run, name)

        def call(*arguments: Any) -> Any:
            calls[name] += 1
            return real(*arguments)

        return call

    for name in calls:
        monkeypatch.setattr(dry_run, name, counted(name))
    return calls


def test_a_plan_records_each_kind_of_checkpointing_once_and_builds_one_stage(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = counted_calls(monkeypatch, "_configure", "_record_step")
    monkeypatch.setattr(memory, "_recorded", {})
    config = small_joint("trainer.global_batch_size=32", "budget.eflops=1")
    make_plan(config, Fleet("H100", count=8, per_node=8, mfu=0.4, price=None), [])
    assert calls == {"_configure": 1, "_record_step": len(KINDS)}


@pytest.mark.parametrize(
    ("make", "device_type"),
    [(small_vae, "cpu"), (small_joint, "cuda"), (small_ar, "cuda"), (small_llada, "cpu")],
)
def test_one_recording_of_many_rows_says_what_two_of_few_say(
    make: Callable[..., RunConfig], device_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make("trainer.precision=bf16", "trainer.global_batch_size=8")
    once = record(config, 2, 2, device_type, ("full",))
    # So many rows that their bytes are beyond 64 bits.
    monkeypatch.setattr(dry_run, "_numbers", lambda module: 2**50)
    rows: list[int] = []
    batch = dry_run._batch

    def noted(count: int, seq_len: int) -> Any:
        rows.append(count)
        return batch(count, seq_len)

    monkeypatch.setattr(dry_run, "_batch", noted)
    twice = record(config, 2, 2, device_type, ("full",))
    assert rows[1:] == [16, 32]
    assert all(same(found, expected) for found, expected in zip(once, twice, strict=True))
    assert once[0].per_row.any()
    assert once[0].fixed.any()


def test_kinds_of_checkpointing_do_not_change_each_other() -> None:
    config = small_joint("trainer.precision=bf16")
    together = dict(zip(KINDS, record(config, 1, 1, "cuda", KINDS), strict=True))
    assert not same(together["none"], together["full"])
    # The last of them, in a stage of its own.
    (alone,) = record(config, 1, 1, "cuda", ("full",))
    assert same(alone, together["full"])


@pytest.mark.parametrize(
    ("make", "overrides", "world_size", "device_type"),
    [
        (small_ar, ("transformer.num_hidden_layers=6",), 1, "cuda"),
        (small_llada, ("transformer.num_hidden_layers=7", "ema.decay=0.9"), 8, "cpu"),
        (small_vae, ("vae.encoder_num_blocks=6", "vae.decoder_num_blocks=7"), 8, "cuda"),
        (small_joint, ("dit.num_layers=6", "vae.decoder_num_blocks=6"), 8, "cuda"),
    ],
)
def test_few_layers_say_what_all_say(
    make: Callable[..., RunConfig],
    overrides: tuple[str, ...],
    world_size: int,
    device_type: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = make("trainer.precision=bf16", "trainer.global_batch_size=8", *overrides)
    asked = counted_calls(monkeypatch, "_configure")
    few = record(config, world_size, world_size, device_type, KINDS)
    assert asked == {"_configure": 1}  # not again with all layers
    monkeypatch.setattr(layers, "KEPT_LAYERS", 100)
    every = record(config, world_size, world_size, device_type, KINDS)
    assert all(same(found, expected) for found, expected in zip(few, every, strict=True))
    assert len(few[0].fixed) == len(every[0].fixed)


def test_layers_that_differ_are_all_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_ar("trainer.precision=bf16", "transformer.num_hidden_layers=6")
    monkeypatch.setattr(layers, "KEPT_LAYERS", 3)  # no two inner ones
    (few,) = record(config, 1, 1, "cuda", ("none",))
    monkeypatch.setattr(layers, "KEPT_LAYERS", 100)
    (every,) = record(config, 1, 1, "cuda", ("none",))
    assert same(few, every)


def test_bytes_that_units_do_not_tell_apart_are_noticed() -> None:
    mode, log = RecordingMode(), AllocationLog(vocab_size=7)
    with mode, mode.recording_to(log):
        kept = torch.zeros(1000, dtype=torch.uint8)
        log.take_rest(dry_run.MemoryPart.ACTIVATIONS)
        del kept
    fixed, of_unit = log.live_apart(4096)
    assert fixed.sum(axis=1).tolist() == [1000, 0]
    assert not of_unit.any()
    with pytest.raises(AssertionError, match=r"1000 bytes .* with 1024 units"):
        log.live_apart(1024)
