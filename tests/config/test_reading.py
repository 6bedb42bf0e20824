"""What a text in a config means, what is no config, and that what is saved reads back."""

import dataclasses
import os
import subprocess
import sys
import threading
import time
import typing
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from cola_train.config.load import load_config, to_yaml
from cola_train.config.reading import MOST_BYTES
from cola_train.config.settings import Settings, UserError, at_least, section, setting
from cola_train.families.cola.config import VAERunConfig

LOOK_LIKE_OTHERS = [
    "2024_05_01", "2024-05-01", "no", "True", "1.10", "007", "0x10", "1e3", "12:30:00", "a: b",
    "[a", "a # b", "{a", "- a", "*a", "&a", "!a", "%", "@", ".inf", "=", "<<",
    "caf\u00e9 \U0001f600",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Inner(Settings):
    """A section."""

    words: list[str] = setting(["a"], help="Texts.")
    times: tuple[float, float] = setting((0.0, 1.0), help="Two.")
    ids: tuple[int, ...] | None = setting(None, help="Some.")


@dataclasses.dataclass(frozen=True)
class Outer(Settings):
    """One setting of each kind."""

    word: str = setting(help="A text.")
    maybe: str | None = setting(None, help="A text or none.")
    whole: int = setting(1, help="A number.", rule=at_least(-(10**30)))
    real: float = setting(1.0, help="A number.", rule=at_least(-1e300))
    flag: bool = setting(False, help="Yes or no.")
    choice: typing.Literal["off", "1"] = setting("off", help="One of two.")
    inner: Inner = section(Inner, help="A section.")
    table: dict[str, list[str]] = setting({}, help="Texts by name.")
    sections: dict[str, Inner] = setting({}, help="Sections by name.")


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("text", LOOK_LIKE_OTHERS)
def test_a_text_is_what_was_typed(text: str, tmp_path: Path) -> None:
    config = load_config(Outer, None, [f"word={text}", f"maybe={text}", f"inner.words=['{text}']"])
    assert (config.word, config.maybe, config.inner.words) == (text, text, [text])
    assert load_config(Outer, write(tmp_path / "saved.yaml", to_yaml(config))) == config


def test_words_of_lists_and_files_stay_too(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.yaml", "word: 2024_05_01\ninner: {words: [No, 1.10, 007]}\nmaybe: on"
    )
    config = load_config(Outer, path, ["table.a=[12:30:00, 1e3]"])
    assert (config.word, config.maybe) == ("2024_05_01", "on")
    assert config.inner.words == ["No", "1.10", "007"]
    assert config.table == {"a": ["12:30:00", "1e3"]}


def test_null_is_null_without_quotes_alone() -> None:
    assert load_config(Outer, None, ["word=w", "maybe=null"]).maybe is None
    assert load_config(Outer, None, ["word=w", "maybe='null'"]).maybe == "null"
    assert load_config(Outer, None, ["word=''"]).word == ""
    for empty in ("word=", "word=null", "inner.words=[null]"):
        with pytest.raises(UserError, match="must be a text, in quotes if it looks like nothing"):
            load_config(Outer, None, ["word=w", empty])


@pytest.mark.parametrize(
    "text, number",
    [("1e3", 1000), ("3.6e9", 3_600_000_000), ("5.0", 5), ("1_000", 1000), ("-7", -7)],
)
def test_whole_numbers_may_be_written_with_an_exponent(text: str, number: int) -> None:
    found = load_config(Outer, None, ["word=w", f"whole={text}"]).whole
    assert (found, type(found)) == (number, int)


@pytest.mark.parametrize(
    "override, message",
    [
        ("whole=1.5", "'whole' .* must be a whole number, not 1.5"),
        ("whole=1e99", "must be a whole number"),
        ("whole=1e999999999", "must be a whole number"),
        ("whole=true", "must be a whole number, not true"),
        ("whole=12:30", "must be a whole number, not 12:30"),
        ("real=.inf", "must be a finite number, not .inf"),
        ("real=nan", "must be a finite number, not nan"),
        ("real=1e999", "must be a finite number, not 1e999"),
        ("real=", "must be a finite number"),
        ("flag=maybe", "must be true or false, not maybe"),
        ("choice=2", "must be one of off, 1, not 2"),
        ("inner.words=a", r"'inner.words' .* must be a list, such as \[a, b\], not a"),
        ("inner.words=[[1]]", r"'inner.words\[0\]' .* must be a single value, not \[1\]"),
        ("inner.words.0=hi", "'inner.words' .* must be a list"),
        ("inner.times=[1]", "must be a list of 2"),
        ("inner.ids=[a]", r"'inner.ids\[0\]' .* must be a whole number, not a"),
        ("table.a.b=1", "'table.a' .* must be a list"),
        ("sections.a.b=1", "Unknown config key 'sections.a.b'"),
        ("sections.a=1", "'sections.a' .* is a section of keys, not the value 1"),
        ("inner={words: [a], words: [b]}", "the key 'words' stands twice"),
        ("whole=[1", "is not valid YAML"),
        ("whole=!!python/object:os.system 1", "is a tag, which configs do not have"),
        ('real="\\UFFFFFFFF"', "is not valid YAML"),
        ("whole=\x01", "is not valid YAML"),
        ("word=${USER}", "word is '.{USER}', and nothing is replaced in a config"),
    ],
)
def test_what_does_not_fit_gets_one_line(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as refused:
        load_config(Outer, None, ["word=w", override])
    assert "\n" not in str(refused.value)


TEXTS = st.text(st.characters(codec=None), max_size=20) | st.sampled_from(
    [
        *LOOK_LIKE_OTHERS,
        "",
        "null",
        "~",
        "???",
        "Price ${amount}",
        "\\${a}",
        "'",
        '"',
        "#",
        "a\n\n b ",
    ]
)
NAMES = st.text(st.characters(codec="utf-8"), max_size=8)
FLOATS = st.floats(-1e300, 1e300)
INNER = st.builds(
    Inner,
    words=st.lists(TEXTS, max_size=3),
    times=st.tuples(FLOATS, FLOATS),
    ids=st.none() | st.lists(st.integers(-5, 2**62), max_size=2).map(tuple),
)


@given(
    st.builds(
        Outer,
        word=TEXTS.filter(lambda text: "${" not in text and text != "???"),
        maybe=st.none() | TEXTS.filter(lambda text: "${" not in text),
        whole=st.integers(-(2**63) + 1, 2**63 - 1),
        real=FLOATS,
        flag=st.booleans(),
        choice=st.sampled_from(["off", "1"]),
        inner=INNER,
        table=st.dictionaries(NAMES, st.lists(TEXTS, max_size=2), max_size=2),
        sections=st.dictionaries(NAMES, INNER, max_size=2),
    )
)
@settings(max_examples=50, deadline=None)
def test_every_config_that_is_written_reads_back(config: Outer) -> None:
    text = to_yaml(config)
    text.encode("utf-8")
    read = yaml.safe_load(text)  # by another reader, as far as types say the same
    assert read["flag"] is config.flag
    found = build(text)
    assert found == config
    assert repr(found) == repr(config)  # 1 == True, 0.0 == -0.0


def build(text: str) -> Outer:
    from cola_train.config.load import build_config
    from cola_train.config.reading import parse

    return build_config(Outer, parse(text, "saved"), "saved")


def test_prompts_and_names_of_a_run_read_back(tmp_path: Path) -> None:
    prompts = ["Price ${amount}", "???", "# no", "1.10", "", 'a "b"']
    config = load_config(
        VAERunConfig, None, ["name=2024_05_01", "data.path=no", "vae.block_size=1"]
    )
    trainer = dataclasses.replace(config.trainer, sample_prompts=prompts)
    config = dataclasses.replace(config, trainer=trainer)
    assert load_config(VAERunConfig, write(tmp_path / "c.yaml", to_yaml(config))) == config


def test_anchors_and_merges_of_yaml_work_and_the_nearer_wins(tmp_path: Path) -> None:
    text = "word: w\nsections:\n  a: &a {words: [x], ids: [1]}\n  b: {<<: *a, ids: [2]}\n  c: *a\n"
    found = load_config(Outer, write(tmp_path / "a.yaml", text)).sections
    assert found == {
        "a": Inner(words=["x"], ids=(1,)),
        "b": Inner(words=["x"], ids=(2,)),
        "c": Inner(words=["x"], ids=(1,)),
    }


LAUGHS = "a: &a [x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi")
)


@pytest.mark.parametrize(
    "text, message",
    [
        ("word: w\ninner: {}\nword: v\n", "the key 'word' stands twice .lines 1 and 3."),
        ("word: w\nreal: !!float 1\nwhole: !x 1", "line 3: !x is a tag"),
        ("? [a]\n: b\n", "line 1: a key must be a name"),
        ("word: " + "[" * 20_000, "nested too deep"),
        ("word: w\n" + "".join(f"{' ' * n}a:\n" for n in range(500)), "nested too deep"),
        ("word: &a [*a]", "nested too deep"),
        (LAUGHS, "Unknown config key 'a'"),
        (LAUGHS.replace("i:", "word:"), "Unknown config key 'a'"),
        (f"word: {'x' * MOST_BYTES}", "longer than a config can be"),
        ("x" * (MOST_BYTES - 9), "must hold keys and values at the top level, not one value"),
        ("a: 1\n---\nb: 2\n", "not valid YAML.*another document"),
        ('base: "\\0"\n', "Cannot read the config file"),
        ('base: "\\uD800"\n', "Cannot read the config file"),
        ("base: {a: b}\n", "`base` must be the name"),
    ],
)
def test_a_hostile_file_gets_one_short_line_in_time(
    text: str, message: str, tmp_path: Path
) -> None:
    path, begin = write(tmp_path / "a.yaml", text), time.monotonic()
    with pytest.raises(UserError, match=message) as refused:
        load_config(Outer, path)
    assert len(str(refused.value)) < 1000
    assert "\n" not in str(refused.value)
    assert time.monotonic() - begin < 20


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    file = write(tmp_path / "a.yaml", "word: w\n")
    os.mkfifo(tmp_path / "pipe.yaml")
    for path, message in {
        Path("/dev/zero"): "it is neither a file nor a pipe. Give a .yaml file",
        Path("/dev/null"): "it is neither a file nor a pipe",
        tmp_path: "is a folder",
        file / "x.yaml": "Not a directory",
        tmp_path / "loop.yaml": "symbolic links",
        tmp_path / f"{'x' * 300}.yaml": "File name too long",
        tmp_path / "pipe.yaml": "it is a pipe through which no whole file comes. Give",
        tmp_path / "**" / "[": "There is no config file",
    }.items():
        begin = time.monotonic()
        with pytest.raises(UserError, match=message) as refused:
            load_config(Outer, path)
        assert "\n" not in str(refused.value)
        assert time.monotonic() - begin < 5


def test_a_config_comes_through_a_pipe_whose_writer_is_late(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.yaml"
    os.mkfifo(pipe)

    def write_slowly() -> None:
        time.sleep(0.2)
        with pipe.open("w") as file:
            file.write("word: w\n")
            file.flush()
            time.sleep(0.2)
            file.write("whole: 3\n")

    thread = threading.Thread(target=write_slowly)
    thread.start()
    try:
        assert load_config(Outer, pipe).whole == 3
    finally:
        thread.join()


def test_a_config_comes_from_the_shells_substitution() -> None:
    program = (
        "import sys; from pathlib import Path; from cola_train.config.load import load_config; "
        "from cola_train.config.sampling import SamplerConfig; "
        "print(load_config(SamplerConfig, Path(sys.argv[1])).max_new_tokens)"
    )
    command = f"'{sys.executable}' -c '{program}' <(echo 'max_new_tokens: 3')"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout == "3\n"
