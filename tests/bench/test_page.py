"""docs/benchmarks.md: its commands are ones that the program takes, and its targets follow from its
table.
"""

import re
import shlex

import pytest

from cola_train.bench.config import BenchTrainConfig, split_settings
from cola_train.bench.workloads import run_config, workloads
from cola_train.cli import make_parser
from cola_train.config.load import load_config
from tests.helpers.programs import ROOT

PAGE = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
COMMANDS = [
    line
    for block in re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL)
    for line in block.splitlines()
]


@pytest.mark.parametrize("command", [line for line in COMMANDS if line.startswith("cola-train ")])
def test_commands_of_the_page_are_taken(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    options = make_parser().parse_args(shlex.split(command)[1:])
    own, of_run = split_settings(options.settings)
    config = load_config(options.config_class, None, own)
    if isinstance(config, BenchTrainConfig):
        assert run_config(config, of_run)
    else:
        assert not of_run


def test_the_page_names_every_workload_and_the_script() -> None:
    assert {line for line in COMMANDS if not line.startswith("cola-train bench ")} == {
        "bash scripts/bench_gpu.sh 'my_texts/*.txt' bench-gpu"
    }
    assert (ROOT / "scripts" / "bench_gpu.sh").is_file()
    assert all(f"**{name}**" in PAGE for name in workloads())


def test_memory_is_three_quarters_and_with_full_checkpointing_45_percent_of_the_released() -> None:
    rows = re.findall(
        r"^\| train (?:M|S), \d x \d+ \| ([\d,]+) \| ([\d,]+) \| \S+ \| ([\d,]+) \|",
        PAGE,
        flags=re.MULTILINE,
    )
    assert len(rows) == 3
    for released, asked, asked_full in rows:
        grew = int(released.replace(",", ""))
        assert int(asked.replace(",", "")) == pytest.approx(0.75 * grew, abs=1)
        assert int(asked_full.replace(",", "")) == pytest.approx(0.45 * grew, abs=1)
