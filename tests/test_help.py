"""A verb's help: one screen, and the way from it to every setting; and docs/config.md, which lists
them all.
"""

import dataclasses
import re
from pathlib import Path

import pytest

from cola_train.cli import main, make_parser
from cola_train.cli.config_docs import COMMAND, page, settings_verbs
from cola_train.cli.verb import FEW, brief
from cola_train.config.describe import describe, sections
from cola_train.config.load import leaves
from cola_train.config.settings import section, setting

DOCS = Path(__file__).resolve().parents[1] / "docs" / "config.md"
VERBS = dict(settings_verbs(make_parser()))
MANY = [name for name, config_class in VERBS.items() if len(describe(config_class)) > FEW]


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


def shown(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> str:
    with pytest.raises(SystemExit) as end:
        main(list(arguments))
    assert end.value.code == status
    out, err = capsys.readouterr()
    assert (err if status == 0 else out) == ""
    return out if status == 0 else err


def listed(text: str) -> list[str]:
    """The keys that a table of settings has: one a line, the meaning below it."""
    return re.findall(r"^  (\S+)$", text, flags=re.MULTILINE)


def keys_of(name: str) -> list[str]:
    """As the merge of configs sees them, by other code than the help's."""
    return [key for key, _ in leaves(VERBS[name]) if key != "stage"]


def test_the_verbs_with_many_settings_are_those_that_need_a_first_screen() -> None:
    assert {"vae", "joint", "ar", "llada", "sample", "evaluate", "compare", "curve run"} < set(MANY)
    assert "prepare" in MANY
    assert {"tokenizer train", "likelihood", "inspect", "bench train"} <= set(VERBS) - set(MANY)


@pytest.mark.parametrize("name", MANY)
@pytest.mark.parametrize("option", ["-h", "--help"])
def test_the_first_screen_fits_and_leads_on(
    name: str, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shown(capsys, *name.split(), option)
    lines = out.splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 100
    assert f"usage: cola-train {name} [-h [WORD]]" in out
    assert f"For example:\n  cola-train {name} " in out
    common = [entry.key for entry in describe(VERBS[name]) if entry.common]
    assert 5 <= len(common) <= 14
    assert common == re.findall(r"^  ([\w.]+) +\S.* \[.*\]$", out, flags=re.MULTILINE)
    parts = sections(VERBS[name])
    assert re.findall(r"^  (\w+) +(\d+)  \S", out, flags=re.MULTILINE)[
        -len(parts) or len(lines) :
    ] == [(part.key, str(part.count)) for part in parts]
    assert "--help all" in out
    assert "--help WORD" in out


@pytest.mark.parametrize("name", sorted(set(VERBS) - set(MANY)))
def test_few_settings_are_shown_at_once(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = shown(capsys, *name.split(), "--help")
    assert listed(out.partition("settings (key=value")[2]) == keys_of(name)
    assert all(len(line) <= 100 for line in out.splitlines())


def test_the_first_screen_has_options_and_what_is_required(
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = shown(capsys, "joint", "--help")
    assert "  --resume RUN " in out
    assert re.search(
        r"^  data\.path +A folder written by `cola-train prepare`\. \[required\]$",
        out,
        flags=re.MULTILINE,
    )
    # The samplers of what watch evaluates have common settings as well, which are not common in a
    # training.
    assert "num_steps" not in out


@pytest.mark.parametrize("name", VERBS)
def test_all_are_all(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = shown(capsys, *name.split(), "--help", "all")
    assert [key for key in listed(out) if ".NAME." not in key] == keys_of(name)
    assert f"all {len(listed(out))} settings of `cola-train {name}`:" in out


def test_a_section_is_listed_with_meanings_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    out = shown(capsys, "joint", "--help", "objective.flow")
    assert out.startswith("10 settings of section objective.flow of `cola-train joint`:\n")
    assert listed(out) == [key for key in keys_of("joint") if key.startswith("objective.flow.")]
    assert "  objective.flow.time_loc\n      Mean of the normal under the sigmoid. [1.0; a f" in out
    assert len(listed(shown(capsys, "joint", "--help", "optim"))) == 16


def test_a_sections_own_defaults_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert "  greedy.guidance_scale\n      Classifier-free guidance g; 1 is off. [7.0; a" in shown(
        capsys, "compare", "-h", "greedy"
    )
    assert "  sampler.guidance_scale\n      Classifier-free guidance g; 1 is off. [1.0; a" in shown(
        capsys, "compare", "-h", "sampler"
    )


def test_settings_by_a_name_of_ones_own_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    out = shown(capsys, "curve", "run", "--help", "families")
    assert listed(out) == [
        "families",
        "families.NAME.config",
        "families.NAME.sizes",
        "families.NAME.stage1",
    ]
    assert "start from the spec's folder. [required]" in out


def test_a_word_finds_settings_by_key_and_by_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    found = listed(shown(capsys, "joint", "--help", "learning"))
    assert "optim.learning_rate" in found  # by its key
    assert "optim.weight_decay" in found  # by its meaning
    by_hand = [
        key
        for key, field in leaves(VERBS["joint"])
        if "learning" in f"{key} {field.metadata['help']}"
    ]
    assert found == by_hand
    # A name's words are found as words are written, too.
    meanings = {key: field.metadata["help"] for key, field in leaves(VERBS["joint"])}
    assert listed(shown(capsys, "joint", "-h", "LEARNING rate")) == [
        key for key in by_hand if "learning_rate" in key or "learning rate" in meanings[key].lower()
    ]
    # Options and settings before it are no hindrance.
    assert listed(shown(capsys, "joint", "seed=3", "--resume", "x", "--help=anneal"))


def test_one_setting_is_one_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(capsys, "joint", "--help", "data_seed").startswith(
        "1 setting with 'data_seed' of `cola-train joint`:\n"
    )


@pytest.mark.parametrize(
    "word, end",
    [
        ("lerning_rate", "did you mean 'learning_rate'?"),
        ("optm", "did you mean 'optim'?"),
        ("objective.flwo", "did you mean 'objective.flow'?"),
        ("xyzzy", "--help all lists them."),
    ],
)
def test_an_unknown_word_gets_one_line_and_status_2(
    word: str, end: str, capsys: pytest.CaptureFixture[str]
) -> None:
    err = shown(capsys, "joint", "--help", word, status=2)
    assert (
        err == f"cola-train: error: No setting of `cola-train joint` has '{word}' in its name or "
        f"meaning; {end}\n"
    )


def test_a_narrow_terminal_is_not_exceeded_by_settings(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "72")
    assert max(map(len, shown(capsys, "joint", "--help", "all").splitlines())) <= 72
    assert "  optim.warmup               How long the linear warm-up takes. ['5000']\n" in shown(
        capsys, "joint", "--help"
    )


@pytest.mark.parametrize(
    "meaning, room, expected",
    [
        ("Steps in all; a budget may end it.", 40, "Steps in all; a budget may end it."),
        ("Steps in all; a budget may end it.", 30, "Steps in all."),
        (
            "wsd: a run at a constant rate, and an anneal from it.",
            40,
            "wsd: a run at a constant rate...",
        ),
        ("Of the ODE: euler (order 1, cheap), heun.", 38, "Of the ODE: euler (order 1, cheap)..."),
        ("Divides positive and multiplies negative ones.", 24, "Divides positive and..."),
    ],
)
def test_a_meaning_is_cut_where_it_still_says_something(
    meaning: str, room: int, expected: str
) -> None:
    assert brief(meaning, room) == expected
    assert len(expected) <= room


def test_common_is_declared_where_a_setting_is() -> None:
    @dataclasses.dataclass(frozen=True)
    class Inner:
        a: int = setting(1, help="A.", common=True)
        b: int = setting(2, help="B.")

    @dataclasses.dataclass(frozen=True)
    class Outer:
        near: Inner = section(Inner, help="Near.")
        far: Inner = section(Inner, help="Far.", common=False)
        c: list[int] = setting([1], help="C.", common=True)
        d: bool = setting(False, help="D.")
        e: str | None = setting(None, help="E.")
        f: str = setting("???", help="F.")
        g: int = setting(1, help="G.")

    assert [(entry.key, entry.default, entry.common) for entry in describe(Outer)] == [
        ("near.a", "1", True),
        ("near.b", "2", False),
        ("far.a", "1", False),
        ("far.b", "2", False),
        ("c", "[1]", True),
        ("d", "false", False),
        ("e", "null", False),
        ("f", "required", False),
        ("g", "1", False),
    ]
    assert [(part.key, part.count) for part in sections(Outer)] == [("near", 2), ("far", 2)]


def test_no_section_or_setting_is_called_as_everything_is() -> None:
    assert all(
        "all" not in entry.key.split(".")
        for config_class in VERBS.values()
        for entry in describe(config_class)
    )


def test_the_page_of_settings_is_what_the_code_says() -> None:
    assert DOCS.read_text(encoding="utf-8") == page(), (
        f"docs/config.md is not of this code: run `{COMMAND}`"
    )


def test_the_page_has_every_setting_of_every_verb_and_what_runs_share_once() -> None:
    text = DOCS.read_text(encoding="utf-8")
    keys = re.findall(r"^\| `([\w.]+)` \| ", text, flags=re.MULTILINE)
    for name in VERBS:
        assert set(keys_of(name)) <= set(keys), name
        assert f"`cola-train {name}`" in text
    assert (
        keys.count("trainer.max_steps")
        == keys.count("in_loop_eval.benchmarks.sampler.num_steps")
        == keys.count("vae.dim")
        == 1
    )
    assert {"families.NAME.config", "dit.num_layers", "transformer.head_dim"} <= set(keys)
