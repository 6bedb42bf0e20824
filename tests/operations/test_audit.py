"""The audit: logs made up step by step, clean ones and ones with each kind of thing wrong; and a
real run's, resumed.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cola_train.config.settings import UserError
from cola_train.data.batch import row_index
from cola_train.families.cola.config import JointRunConfig
from cola_train.operations import audit as module
from cola_train.operations.audit import audit, promise
from cola_train.operations.step_history import read_history
from cola_train.run_layout import STEP_LOG, folder_of
from cola_train.training.loop.step_log import Attempt, Step, digest_text, sample_digest
from cola_train.training.run import resume, train

FIRST = Attempt(0, 2, "fsdp2", 2, 4, 10, 66, 6198, "aa")
Log = list[Attempt | Step]


def digest_of(seed: int, samples: torch.Tensor, rows: torch.Tensor) -> str:
    return digest_text(int(sample_digest(seed, samples.to(torch.int64), rows.to(torch.int64))))


def samples_of(step: int, attempt: Attempt) -> tuple[torch.Tensor, torch.Tensor]:
    positions = range((step - 1) * attempt.global_batch_size, step * attempt.global_batch_size)
    rows = row_index(np.array(positions), attempt.num_rows, attempt.data_seed)
    return torch.tensor(list(positions)), torch.tensor(rows)


def done(step: int, attempt: Attempt = FIRST) -> Step:
    return Step(
        step, attempt.global_batch_size, digest_of(attempt.seed, *samples_of(step, attempt))
    )


def made_up(spans: list[tuple[int, int]], first: Attempt = FIRST) -> Log:
    """Attempts that went from a step to a step."""
    log: Log = []
    for number, (begin, end) in enumerate(spans):
        log.append(replace(first, from_step=begin, world_size=1 + number % 3))
        log += [done(step, first) for step in range(begin + 1, end + 1)]
    return log


def write(folder: Path, log: Log, ending: str = "") -> Path:
    folder.mkdir(exist_ok=True)
    lines = [
        (
            {"attempt": asdict(e)}
            if isinstance(e, Attempt)
            else {k: v for k, v in asdict(e).items() if v is not None}
        )
        for e in log
    ]
    (folder / STEP_LOG).write_text(
        "".join(json.dumps(line) + "\n" for line in lines) + ending, encoding="utf-8"
    )
    return folder


def told(capsys: pytest.CaptureFixture[str], folder: Path) -> tuple[int, str]:
    status = audit(folder)
    return status, capsys.readouterr().out


@st.composite
def spans(draw: st.DrawFn) -> list[tuple[int, int]]:
    """Any number of attempts, each from a step that the ones before it have done, some without
    doing any.
    """
    found: list[tuple[int, int]] = []
    for _ in range(draw(st.integers(1, 6))):
        reached = 0
        for begin, end in found:
            reached = max(min(reached, begin), end)
        begin = draw(st.integers(0, reached)) if found else 0
        found.append((begin, begin + draw(st.integers(0, 9))))
    return found


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    spans(),
    st.integers(1, 5),
    st.integers(1, 23),
    st.integers(0, 2**63 - 1),
    st.sampled_from([1, 7, 1 << 16]),
    st.booleans(),
)
def test_any_attempts_that_did_as_promised_are_clean(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    attempts: list[tuple[int, int]],
    size: int,
    num_rows: int,
    seed: int,
    at_once: int,
    cut: bool,
) -> None:
    first = replace(FIRST, global_batch_size=size, num_rows=num_rows, seed=seed)
    run = write(
        tmp_path / "run", made_up(attempts, first), '{"step": 4, "rows": 4, "dige' if cut else ""
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_SAMPLES_AT_ONCE", at_once)
        status, text = told(capsys, run)
        history = read_history(run)
        promised = promise(history)
    assert (status, text.splitlines()[-1][:6]) == (0, "CLEAN:"), text
    reached = 0
    for begin, end in attempts:
        reached = max(min(reached, begin), end)
    # Later attempts that went less far than earlier ones leave what is beyond them lost.
    assert history.step[history.counts].tolist() == list(range(1, reached + 1))
    assert len(history.step) == sum(end - begin for begin, end in attempts)
    assert promised.complete_epochs == reached * size // num_rows
    assert promised.rows_of_the_last == reached * size % num_rows


def test_the_report_of_a_clean_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = made_up([(0, 5), (3, 7), (6, 6)])
    log[2] = replace(log[2], skipped="not finite: loss = nan")
    run = write(tmp_path / "run", log)
    status, text = told(capsys, run)
    assert status == 0
    assert text.splitlines() == [
        f"run       {run}",
        "attempts  3: 1 with 1 process, 1 with 2 processes, 1 with 3 processes",
        "steps     6, of 4 samples each; the last is 6",
        "lost      3 steps, 2 of them done again so far",
        "skipped   1 steps; step 2: not finite: loss = nan",
        "epochs    2 complete; 4 of 10 rows of the next",
        (
            "CLEAN: every step used the samples it had to, in the order of seed 66 and data_seed "
            "6198."
        ),
    ]


def other(step: int, *, row: int = 0, sample: int = 0, seed: int = 0) -> Step:
    samples, rows = samples_of(step, FIRST)
    rows[1] = (rows[1] + row) % FIRST.num_rows
    samples[1] += sample
    return Step(step, 4, digest_of(FIRST.seed + seed, samples, rows))


def as_step(step: int, of: int) -> Step:
    return replace(done(of), step=step)


# The log is: attempt, steps 1 to 5, attempt from 3, steps 4 to 8.
CORRUPTIONS: dict[str, tuple[Callable[[Log], object], list[str]]] = {
    "missing": (
        lambda log: log.pop(2),
        [
            "gaps, where steps are missing: 1",
            "  steps 2 to 2",
            "epochs with rows not used: 1",
            "  epoch 0: 4 of 10 rows, by the steps that fit",
        ],
    ),
    "missing between attempts": (
        lambda log: (
            log.__setitem__(6, replace(FIRST, from_step=7)) or log.__delitem__(slice(7, 11))
        ),
        ["gaps, where steps are missing: 1", "  steps 6 to 7", "epochs with rows not used: 1"],
    ),
    "twice in one attempt": (
        lambda log: log.insert(3, done(2)),
        ["steps out of turn: 1", "  step 2 comes after step 2"],
    ),
    "another row": (
        lambda log: log.__setitem__(2, other(2, row=1)),
        ["steps with other samples: 1", "expected samples 4 to 7", "epochs with rows not used: 1"],
    ),
    "another sample": (
        lambda log: log.__setitem__(9, other(6, sample=40)),
        ["steps with other samples: 1", "  step 6: digest "],
    ),
    "other noise": (
        lambda log: log.__setitem__(9, other(6, seed=1)),
        ["steps with other samples: 1", "  step 6: digest "],
    ),
    "a repeated digest": (
        lambda log: log.__setitem__(2, as_step(2, of=1)),
        [
            "samples used more than once: 1",
            (
                "  step 2: samples 0 to 3, those of step 1; expected samples 4 to 7, digest "
                f"{done(2).digest}"
            ),
            "epochs with rows not used: 1",
        ],
    ),
    "two steps swapped": (
        lambda log: (log.__setitem__(9, as_step(6, of=7)), log.__setitem__(10, as_step(7, of=6))),
        [
            "samples out of order: 2",
            "  step 6: samples 24 to 27, those of step 7; expected samples 20 to 23",
        ],
    ),
    "a lost step": (
        lambda log: log.__setitem__(4, other(4, row=1)),
        [
            "steps with other samples: 1",
            "  step 4 (lost): digest",
            "steps done again with other samples: 1",
            "  step 4: digest ",
        ],
    ),
    "another seed": (
        lambda log: log.__setitem__(6, replace(FIRST, from_step=3, seed=67)),
        ["attempts with other settings: 1", "  attempt 2 (from step 3): seed 67, in attempt 1 66"],
    ),
    "other data": (
        lambda log: log.__setitem__(
            6, replace(FIRST, from_step=3, data_sha256="bb", num_rows=11, data_seed=1)
        ),
        [
            "attempts with other settings: 3",
            "data_sha256 bb, in attempt 1 aa",
            "num_rows 11",
            "data_seed 1, in attempt 1 6198",
        ],
    ),
    "another batch": (
        lambda log: log.__setitem__(6, replace(FIRST, from_step=3, global_batch_size=8)),
        ["attempts with other settings: 1", "global_batch_size 8, in attempt 1 4"],
    ),
    "a lost row": (
        lambda log: log.__setitem__(3, replace(done(3), rows=3)),
        ["steps of another number of rows: 1", "  step 3: 3 rows, not 4"],
    ),
    "a step far out": (
        lambda log: log.append(done(3_000_000_000)),
        [
            "  steps 9 to 2999999999",
            "epochs with rows not used: 1,199,999,997",
            "  epoch 3: 8 of 10 rows",
        ],
    ),
}


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_what_is_wrong_is_found_and_named(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = made_up([(0, 5), (3, 8)])
    corrupt, expected = CORRUPTIONS[kind]
    corrupt(log)
    status, text = told(capsys, write(tmp_path / "run", log))
    assert status == 1
    assert (
        text.splitlines()[-1]
        == "NOT CLEAN: not every step used the samples it had to, in the order of seed 66 and "
        "data_seed 6198."
    )
    missing = [line for line in expected if line not in text]
    assert not missing, text


@settings(max_examples=20)
@given(st.integers(1, 8), st.integers(0, 2**64 - 1))
def test_every_other_digest_is_found(
    tmp_path_factory: pytest.TempPathFactory, step: int, digest: int
) -> None:
    log = [
        replace(e, digest=f"{digest:016x}") if isinstance(e, Step) and e.step == step else e
        for e in made_up([(0, 8)])
    ]
    kinds = [
        finding.kind
        for finding in module._sample_findings(*(both(tmp_path_factory.mktemp("log"), log)))
    ]
    assert kinds == ([] if done(step).digest == f"{digest:016x}" else ["steps with other samples"])


def both(folder: Path, log: Log) -> tuple[module.History, module.Promised]:
    history = read_history(write(folder, log))
    return history, promise(history)


def test_an_order_that_is_no_permutation_is_found_though_every_digest_fits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(positions: np.ndarray, num_rows: int, data_seed: int) -> np.ndarray:
        rows = row_index(positions, num_rows, data_seed)
        return np.where(positions == 13, row_index(12, num_rows, data_seed), rows)

    log = made_up([(0, 8)])
    positions = np.arange(12, 16)
    log[4] = Step(
        4,
        4,
        digest_of(66, torch.from_numpy(positions), torch.from_numpy(broken(positions, 10, 6198))),
    )
    monkeypatch.setattr(module, "row_index", broken)
    status, text = told(capsys, write(tmp_path / "run", log))
    assert status == 1
    assert text.splitlines()[5:-1] == [
        "epochs    2 complete; 2 of 10 rows of the next",
        "epochs with rows used more than once: 1",
        "  epoch 1: 1 of 10 rows, by the steps that fit",
        "epochs with rows not used: 1",
        "  epoch 1: 1 of 10 rows, by the steps that fit",
    ]


def test_only_the_first_of_many_are_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = made_up([(0, 40)])
    log[1:] = [other(step, row=1) for step in range(1, 41)]
    _, text = told(capsys, write(tmp_path / "run", log))
    lines = text.splitlines()
    place = lines.index("steps with other samples: 40")
    assert lines[place + 11] == "  and 30 more"


def test_an_epoch_of_many_rows_is_counted_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SAMPLES_AT_ONCE", 64)
    first = replace(FIRST, num_rows=1000, global_batch_size=10)
    _, promised = both(tmp_path / "run", made_up([(0, 250)], first))
    assert (promised.complete_epochs, promised.rows_of_the_last, promised.findings) == (2, 500, ())


@pytest.mark.parametrize(
    "content, message",
    [
        (None, r"has no steps.jsonl to audit; give the folder of a run that has begun"),
        ("", r"is not a log of steps \(it has no attempt\)"),
        (json.dumps(asdict(done(1))) + "\n", r"is not a log of steps \(step 1 of attempt 0\)"),
        ('{"attempt": {"from_step": 0}}\n', r"is not a log of steps \(.*missing"),
        ('{"loss": 1}\n', r"is not a log of steps"),
        ("3\n", r"is not a log of steps"),
    ],
)
def test_what_is_no_log_is_refused(content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / STEP_LOG).write_text(content)
    with pytest.raises(UserError, match=message):
        audit(tmp_path)


def test_a_real_run_resumed_and_over_several_epochs(
    joint_config: Callable[..., JointRunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    size = 128
    batch = [
        f"trainer.global_batch_size={size}",
        f"trainer.micro_batch_size={size}",
        "optim.decay=40",
    ]
    train(joint_config("run", *batch, "trainer.max_steps=3"))
    run = folder_of(joint_config("run"))
    train(resume(run, JointRunConfig, ["trainer.max_steps=6"]))
    num_rows = read_history(run).attempts[0].num_rows
    train(
        resume(
            run,
            JointRunConfig,
            [f"trainer.max_steps={num_rows // size + 2}", f"trainer.micro_batch_size={size // 2}"],
        )
    )
    capsys.readouterr()
    status, text = told(capsys, run)
    assert status == 0
    assert "attempts  3: 3 with 1 process\n" in text
    assert "epochs    1 complete; " in text
    # The same log of a run that would have had another seed.
    (run / STEP_LOG).write_text((run / STEP_LOG).read_text().replace('"seed": 66', '"seed": 65'))
    assert told(capsys, run)[0] == 1
