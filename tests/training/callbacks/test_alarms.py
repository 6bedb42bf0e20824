"""Alarms: a collapsed VAE raises one and a healthy one none; each is raised once an episode, and
survives a resume.
"""

import dataclasses
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cola_train.config.loop import AlarmsConfig
from cola_train.config.settings import UserError
from cola_train.families.cola.config import VAERunConfig
from cola_train.processes import Processes
from cola_train.run_folder import Status, read_status
from cola_train.run_layout import ALARM_LOG, folder_of
from cola_train.training.callbacks.alarms import (
    COLLAPSE,
    DRIFT,
    INACTIVE,
    SPIKE,
    Alarms,
    Episode,
    Memory,
    Signal,
)
from cola_train.training.checkpoints.folder import latest_checkpoint
from cola_train.training.loop.guard import RunStoppedError, UsualLoss, count_taken, usual_loss
from cola_train.training.loop.interrupts import StopRequest
from cola_train.training.loop.module import StageModule
from cola_train.training.loop.state import RunState
from cola_train.training.run import train

VAEConfigs = Callable[..., VAERunConfig]
LONG = [
    "trainer.max_steps=200",
    "optim.decay=200",
    "trainer.validate_every_steps=0",
    "checkpoint.every_steps=1000",
    "trainer.log_every_steps=25",
]


def raised(
    memory: Memory, config: AlarmsConfig, figures: dict[str, float], past_start: bool = True
) -> list[tuple[str, bool]]:
    return [(signal.name, signal.beyond) for signal in memory.see(config, figures, past_start)]


def lines(run: Path, name: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run / name).read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow
def test_a_collapsed_vae_raises_the_alarm_within_200_steps_and_stops_if_asked_then_goes_on(
    vae_config: VAEConfigs, capsys: pytest.CaptureFixture[str]
) -> None:
    config = vae_config(
        "collapsed", *LONG, "objective.kl_weight=10", "alarms.stop=true", "trainer.max_steps=110"
    )
    with pytest.raises(
        RunStoppedError,
        match=r"stopped by alarm \(alarms.stop\) and saved: ALARM at step \d+: posterior collapse",
    ):
        train(config)
    run = folder_of(config)
    (line,) = lines(run, ALARM_LOG)
    step = line["step"]
    # So many must be below in a row; the KL outweighs reconstruction from the first on.
    assert step == 100
    assert (line["alarm"], line["raised"], line["figure"], line["limit"]) == (
        COLLAPSE,
        True,
        "vae_log_snr",
        0.5,
    )
    assert isinstance(line["value"], float)
    assert line["value"] < 0.5
    assert [
        row["alarm/posterior_collapse"]
        for row in lines(run, "metrics.jsonl")
        if "alarm/posterior_collapse" in row
    ] == [1.0]
    said = [text for text in capsys.readouterr().err.splitlines() if "ALARM" in text]
    assert len(said) == 1
    assert f"ALARM at step {step}: posterior collapse: vae_log_snr = " in said[0]
    assert (
        "below 0.5 (alarms.min_log_snr) 100 times in a row: the latents are mostly noise. Lower "
        "objective.kl_weight" in said[0]
    )
    status = read_status(run)
    assert status is not None
    assert (status.state, status.step) == ("stopped", step)
    assert status.reason.startswith("stopped by alarm")
    latest = latest_checkpoint(run)
    assert latest is not None
    assert latest.name == f"step-{step:08}"
    # The episode is known to the run that goes on: it neither stops again nor says it again.
    assert train(config) == Status("finished", 110)
    assert len(lines(run, ALARM_LOG)) == 1


@pytest.mark.slow
def test_a_healthy_vae_raises_none(vae_config: VAEConfigs) -> None:
    config = vae_config("healthy", *LONG, "objective.kl_weight=1e-4", "alarms.stop=true")
    assert train(config) == Status("finished", 200)
    run = folder_of(config)
    assert not (run / ALARM_LOG).exists()
    found = [
        row["train/vae_log_snr"]
        for row in lines(run, "metrics.jsonl")
        if "train/vae_log_snr" in row
    ]
    # It did begin below the threshold.
    assert isinstance(found[-1], float)
    assert found[-1] > 2


@given(st.lists(st.booleans(), max_size=60), st.integers(1, 6), st.integers(1, 6))
def test_an_alarm_is_on_from_so_many_beyond_in_a_row_to_so_many_back(
    beyond: list[bool], raise_after: int, clear_after: int
) -> None:
    episode, changes = Episode(), []
    for step, one in enumerate(beyond):
        signal = Signal(COLLAPSE, "x", 0.0, 1.0, "s", one, raise_after, clear_after)
        if episode.see(signal):
            assert episode.raised == one
            changes.append((step, one))
    # By runs of equal values: the first long enough one raises, then the first long enough other
    # one clears, and so on.
    expected, on, start = [], False, 0
    for value, group in itertools.groupby(beyond):
        length = len(list(group))
        if value != on and length >= (raise_after if value else clear_after):
            expected.append((start + (raise_after if value else clear_after) - 1, value))
            on = value
        start += length
    assert changes == expected
    assert episode.raised == on


def test_a_fresh_vae_has_time_and_one_that_was_above_has_not() -> None:
    config = AlarmsConfig(raise_after=3)
    fresh = Memory()
    assert all(
        raised(fresh, config, {"vae_log_snr": 0.0}, past_start=False) == [] for _ in range(10)
    )
    assert [raised(fresh, config, {"vae_log_snr": 0.0}) for _ in range(4)] == [
        [],
        [],
        [(COLLAPSE, True)],
        [],
    ]
    fallen = Memory()
    assert raised(fallen, config, {"vae_log_snr": 4.5}, past_start=False) == []
    found = [raised(fallen, config, {"vae_log_snr": 0.1}, past_start=False) for _ in range(4)]
    assert found == [[], [], [(COLLAPSE, True)], []]
    # What is not there, or no number, is no news: the row goes on.
    other = Memory()
    found = [raised(other, config, {"vae_log_snr": 0.0})]
    found += [raised(other, config, figures) for figures in ({}, {"vae_log_snr": math.nan})]
    found += [raised(other, config, {"vae_log_snr": 0.0}) for _ in range(2)]
    assert found == [[], [], [], [], [(COLLAPSE, True)]]


def test_a_spike_is_beyond_what_is_usual_by_the_deviations_asked_for() -> None:
    usual = UsualLoss(2.0, 0.1)
    for deviations, loss, expected in ((5.0, 2.6, True), (5.0, 2.5, False), (7.0, 2.6, False)):
        found = Memory().see(AlarmsConfig(spike_deviations=deviations), {"loss": loss}, True, usual)
        assert [(signal.name, signal.limit) for signal in found] == [
            (SPIKE, 2.0 + 0.1 * deviations)
        ] * expected
    assert Memory().see(AlarmsConfig(spike_deviations=None), {"loss": 1e9}, True, usual) == []
    assert Memory().see(AlarmsConfig(), {"loss": 1e9}, True, None) == []


def test_a_lasting_jump_is_one_episode_and_becomes_what_is_usual() -> None:
    config, memory, state = AlarmsConfig(clear_after=5), Memory(), RunState()
    generator = np.random.default_rng(0)
    losses = np.concatenate([generator.normal(5, 0.1, 60), generator.normal(9, 0.1, 60)]).tolist()
    told = []
    for step, loss in enumerate(losses):
        changes = memory.see(config, {"loss": loss}, True, usual_loss(state, "a", 20))
        told += [(step, signal.name, signal.beyond) for signal in changes]
        count_taken(state, "a", 20, loss)
    assert told[0] == (60, SPIKE, True)
    assert [change[1:] for change in told] == [(SPIKE, True), (SPIKE, False)]


def test_drift_and_inactive_units_have_thresholds_of_their_own_and_null_is_off() -> None:
    config, memory = AlarmsConfig(raise_after=2, clear_after=2, max_reference_kl=5.0), Memory()
    drifting = [
        raised(memory, config, {"reference_kl_nats_per_token": value})
        for value in (4, 6, 6, 6, 4, 6, 4, 4)
    ]
    assert drifting == [[], [], [(DRIFT, True)], [], [], [], [], [(DRIFT, False)]]
    inspected = [
        raised(memory, config, {"active_units_share": value}) for value in (1.0, 0.25, 0.25, 0.5)
    ]
    assert inspected == [[], [(INACTIVE, True)], [], [(INACTIVE, False)]]
    off = AlarmsConfig(
        min_log_snr=None,
        min_active_units=None,
        max_reference_kl=None,
        spike_deviations=None,
        raise_after=1,
    )
    bad = {
        "vae_log_snr": -9.0,
        "reference_kl_nats_per_token": 1e9,
        "active_units_share": 0.0,
        "loss": 1e9,
    }
    assert [Memory().see(off, bad, True, UsualLoss(1.0, 0.1)) for _ in range(200)] == [[]] * 200


def test_memory_survives_being_saved_to_the_bit() -> None:
    config, memory = AlarmsConfig(), Memory()
    for number in range(15):
        memory.see(
            config, {"loss": number / 3, "vae_log_snr": 0.1 * number}, True, UsualLoss(1 / 3, 0.1)
        )
    assert memory.episodes[SPIKE].raised
    state = RunState(step=15, alarms=dataclasses.asdict(memory))
    restored = RunState.from_json(state.to_json())
    assert restored == state
    assert Memory.from_plain(restored.alarms) == memory
    # A run that was saved before there were alarms goes on.
    assert Memory.from_plain(RunState.from_json('{"step": 3}').alarms) == Memory()


@pytest.mark.parametrize("value, side", [(7.5, "above"), (0.25, "below")])
def test_an_alarm_is_one_line_with_the_figure_the_threshold_and_what_to_do(
    value: float, side: str
) -> None:
    signal = Signal(
        DRIFT, "reference_kl_nats_per_token", value, 5.0, "max_reference_kl", True, 100, 20
    )
    text = signal.text(300)
    assert (
        text == f"ALARM at step 300: latent drift: reference_kl_nats_per_token = {value}, {side} 5 "
        "(alarms.max_reference_kl) 100 times in a row: the encoder leaves the one that stage "
        "2 began with. Raise objective.reference_weight or lower "
        "objective.vae_strategy.learning_rate_factor, in a new run."
    )
    over = dataclasses.replace(signal, value=3.0, beyond=False).text(400)
    assert (
        over
        == "alarm over at step 400: latent drift: reference_kl_nats_per_token = 3, back within 5"
    )


def stage_of(config: VAERunConfig) -> StageModule:
    return StageModule(config, Processes(0, 1, 0, 1), StopRequest())


def test_an_inspection_is_heard_once_with_the_step_it_was_made_at(
    vae_config: VAEConfigs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = vae_config("run", "alarms.stop=true")
    reported: list[tuple[int, dict[str, float]]] = []
    alarms = Alarms(
        config, tmp_path, True, lambda step, figures, began: reported.append((step, dict(figures)))
    )
    module = stage_of(config)
    module.last_metrics = {"loss": 1.0, "vae_log_snr": 4.0}
    for step in range(1, 6):
        module.state.step = step
        if step == 3:
            alarms.see_inspection(
                {"active_units_share": 0.125, "vae_log_snr": -1.0, "posterior_token_accuracy": 0.9}
            )
        alarms.after_step(module)
        assert module.stop_requested == (step >= 3)
    assert reported == [(3, {"alarm/inactive_units": 1.0})]
    assert alarms.stopped_by is not None
    assert alarms.stopped_by.startswith(
        "ALARM at step 3: inactive units: active_units_share = 0.125, below 0.5 "
        "(alarms.min_active_units):"
    )
    (line,) = lines(tmp_path, ALARM_LOG)
    assert (line["step"], line["alarm"], line["raised"], line["value"]) == (
        3,
        INACTIVE,
        True,
        0.125,
    )
    assert capsys.readouterr().err.count("ALARM") == 1
    # Another process says nothing, and stops alike.
    other, quiet = (
        stage_of(config),
        Alarms(config, tmp_path / "none", False, lambda *_: pytest.fail("only process 0 logs")),
    )
    other.last_metrics = module.last_metrics
    quiet.see_inspection({"active_units_share": 0.125})
    quiet.after_step(other)
    assert other.stop_requested
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("kl_weight, first", [(1e-4, 13), (10.0, 3)])
def test_steps_count_from_the_end_of_warm_up_or_as_soon_as_the_kl_outweighs_reconstruction(
    vae_config: VAEConfigs, tmp_path: Path, kl_weight: float, first: int
) -> None:
    config = vae_config(
        "run", f"objective.kl_weight={kl_weight}", "optim.warmup=10", "alarms.raise_after=3"
    )
    alarms, module = Alarms(config, tmp_path, True, lambda *_: None), stage_of(config)
    module.last_metrics = {
        "loss": 46.0,
        "vae_log_snr": 0.0,
        "kl_nats_per_token": 4.0,
        "reconstruction_nats_per_token": 6.0,
    }
    module.last_weights = {"kl_nats_per_token": kl_weight, "reconstruction_nats_per_token": 1.0}
    for step in range(1, 20):
        module.state.step = step
        alarms.after_step(module)
    assert [line["step"] for line in lines(tmp_path, ALARM_LOG)] == [first]


def test_a_fixed_log_snr_is_no_collapse(vae_config: VAEConfigs, tmp_path: Path) -> None:
    config = vae_config("run", "objective.fixed_log_snr=0.25")
    alarms = Alarms(config, tmp_path, True, lambda *_: None)
    assert alarms.config == dataclasses.replace(config.alarms, min_log_snr=None)
    assert Alarms(vae_config("run"), tmp_path, True, lambda *_: None).config.min_log_snr == 0.5


@pytest.mark.parametrize(
    "name, value, message",
    [
        (
            "min_active_units",
            1.5,
            r"AlarmsConfig.min_active_units must be in \(0, 1\] or null, not 1.5",
        ),
        (
            "max_reference_kl",
            0.0,
            r"AlarmsConfig.max_reference_kl must be above 0 or null, not 0.0",
        ),
        (
            "spike_deviations",
            -1.0,
            r"AlarmsConfig.spike_deviations must be above 0 or null, not -1.0",
        ),
        ("raise_after", 0, "AlarmsConfig.raise_after must be at least 1, not 0"),
        ("clear_after", 0, "AlarmsConfig.clear_after must be at least 1, not 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(name: str, value: float, message: str) -> None:
    with pytest.raises(UserError, match=message):
        AlarmsConfig(**{name: value})  # type: ignore[arg-type]  # one field of several types
