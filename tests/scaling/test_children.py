"""Runs as programs of their own: when each begins, and how far they are."""

import dataclasses
import io
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from tqdm import tqdm

from cola_train.families.cola.config import VAERunConfig
from cola_train.families.costs import flops_after
from cola_train.json_lines import JsonlWriter
from cola_train.run_layout import METRICS
from cola_train.scaling import children
from cola_train.scaling.child_progress import ChildProgress
from cola_train.scaling.children import Child, finish

VAEConfigs = Callable[..., VAERunConfig]


def child(make: VAEConfigs, name: str, *after: str) -> Child:
    config = make(name, "trainer.max_steps=10", "optim.decay=10")
    return Child(name, config, ("vae", name), after)


def test_a_run_waits_for_what_it_needs_and_for_nothing_else(
    vae_config: VAEConfigs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, second_began = list[str](), threading.Event()

    def succeeds(arguments: Sequence[str], run: Path) -> bool:
        began.append(run.name)
        if run.name == "second":
            second_began.set()
        # Ends well only if `second` begins meanwhile, which needs `first` alone.
        return run.name != "slow" or second_began.wait(timeout=30)

    monkeypatch.setattr(children, "succeeds", succeeds)
    runs = [
        child(vae_config, "slow"),
        child(vae_config, "first"),
        child(vae_config, "second", "first"),
        child(vae_config, "third", "slow", "second"),
    ]
    measured: list[str] = []

    def measure(run: Child) -> bool:
        measured.append(run.name)
        return True

    seen = [dict(one) for one in finish(tmp_path, runs, measure, retry=False, parallel=2)]
    assert seen[-1] == {run.name: "finished" for run in runs}
    assert sorted(began) == sorted(measured) == ["first", "second", "slow", "third"]
    assert began[-1] == "third"
    assert began.index("first") < began.index("second")


def test_what_needs_a_failed_run_is_not_begun(
    vae_config: VAEConfigs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began: list[str] = []

    def succeeds(arguments: Sequence[str], run: Path) -> bool:
        began.append(run.name)
        return run.name != "first"

    monkeypatch.setattr(children, "succeeds", succeeds)
    runs = [
        child(vae_config, "first"),
        child(vae_config, "second", "first"),
        child(vae_config, "other"),
    ]
    *_, last = finish(tmp_path, runs, lambda run: True, retry=False, parallel=1)
    assert last == {"first": "failed", "second": "waits", "other": "finished"}
    assert began == ["first", "other"]


def test_the_bar_is_the_share_of_flops(vae_config: VAEConfigs, tmp_path: Path) -> None:
    runs = [child(vae_config, name) for name in ("done", "half", "new")]
    (tmp_path / "half").mkdir()
    flops = flops_after(runs[0].config, 10)["model"]
    written = JsonlWriter(tmp_path / "half" / METRICS)
    written.append({"step": 4, "eflops_model": 0.4 * flops / 1e18})
    written.append({"step": 5, "eflops_model": 0.5 * flops / 1e18})
    written.append({"step": 5, "validation/loss": 1.0})
    with (tmp_path / "half" / METRICS).open("a") as file:
        file.write('{"step": 6, "eflops')  # as it is being written
    told = io.StringIO()
    with tqdm(total=3 * flops / 1e12, file=told, bar_format="{n}|{postfix}") as bar:
        progress = ChildProgress(tmp_path, bar)
        progress.show(runs[1:], runs[:1])
        assert bar.n == pytest.approx(1.5 * flops / 1e12, rel=1e-9)
        assert "half 5/10, new 0/10" in told.getvalue()
        # What cannot be told stops nothing.
        broken = dataclasses.replace(runs[1], name="x" * 300)
        progress.show([broken], [])
