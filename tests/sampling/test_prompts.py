"""Prompt files, line by line, and what the `sample` verb writes."""

import contextlib
import dataclasses
import io
import json
import pkgutil
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cola_train.cli import main
from cola_train.config.sampling import SamplerConfig
from cola_train.config.settings import UserError
from cola_train.evaluation.resuming import ResultFile
from cola_train.evaluation.writing.sample import read_prompts, sample
from cola_train.families.cola.checkpoint import ColaCheckpoint
from cola_train.families.generate import generate
from cola_train.json_lines import JsonlWriter
from tests.helpers.tiny import tiny_checkpoint, tiny_dit, tiny_vae

CONFIG = SamplerConfig(num_steps=2, max_new_tokens=4, eos_token_ids=())


@pytest.fixture
def saved(checkpoint: ColaCheckpoint, tmp_path: Path) -> Path:
    checkpoint.save(tmp_path / "saved")
    return tmp_path / "saved"


def write(path: Path, *lines: str) -> Path:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def test_texts_and_ids_are_read_and_other_keys_kept(tmp_path: Path) -> None:
    path = write(
        tmp_path / "p.jsonl",
        '{"prompt": "It is", "id": 7}',
        "",
        '{"input_ids": [4, 5]}',
        "  ",
        '{"input_ids": []}',
        '{"prompt": ""}',
    )
    prompts, records = read_prompts(path)
    assert prompts == ["It is", [4, 5], [], ""]
    assert records == [
        {"prompt": "It is", "id": 7},
        {"input_ids": [4, 5]},
        {"input_ids": []},
        {"prompt": ""},
    ]


@settings(max_examples=60)
@given(
    texts=st.lists(st.text(), min_size=1, max_size=5),
    ascii_only=st.booleans(),
    ending=st.sampled_from(["\n", "\r\n"]),
)
def test_any_text_survives_a_line_of_json(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], ascii_only: bool, ending: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    lines = [json.dumps({"prompt": text}, ensure_ascii=ascii_only) for text in texts]
    path.write_bytes("".join(line + ending for line in lines).encode())
    assert read_prompts(path)[0] == texts


def test_separators_of_unicode_are_text(tmp_path: Path) -> None:
    """JSON lets them stand in a string as they are, and they end no line."""
    path = write(tmp_path / "p.jsonl", '{"prompt": "a\u2028b\u2029c\x85d"}')
    assert read_prompts(path)[0] == ["a\u2028b\u2029c\x85d"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": ', r"line 2 is not JSON \("),
        ("It is", r"line 2 is not JSON \("),
        ('"It is"', r"line 2 must be an object such as .*, not '\"It is\"'"),
        ("[4, 5]", r"line 2 must be an object such as .*, not '\[4, 5\]'"),
        ("{}", r"line 2 needs either `prompt` \(a text\) or `input_ids` \(a list of ids\)"),
        ('{"prompt": "a", "input_ids": [4]}', "line 2 needs either"),
        ('{"prompt": 3}', "line 2 needs either"),
        ('{"input_ids": "4 5"}', "line 2 needs either"),
        ('{"input_ids": [4, "5"]}', "line 2 needs either"),
        ('{"input_ids": [4, 5.0]}', "line 2 needs either"),
        ('{"input_ids": [true]}', "line 2 needs either"),
        (
            r'{"prompt": "hi", "source": "a \ud83d"}',
            r"line 2 has a lone surrogate \(\\ud83d\), half",
        ),
        (r'{"prompt": "\UDFFF"}', r"line 2 is not JSON"),
        (r'{"prompt": "\uDFFF", "a": [{"\ud83d\ude00": 1}]}', r"line 2 has a lone surrogate"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    path = write(tmp_path / "p.jsonl", '{"prompt": "good"}', line)
    with pytest.raises(UserError, match=rf"p\.jsonl, {message}"):
        read_prompts(path)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Cannot read the prompts .*nowhere\.jsonl: No such file"):
        read_prompts(tmp_path / "nowhere.jsonl")
    with pytest.raises(UserError, match=r"Cannot read the prompts .*: Is a directory"):
        read_prompts(tmp_path)
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "é"}'.encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.jsonl is not UTF-8 text \(byte 12\)"):
        read_prompts(tmp_path / "latin.jsonl")
    with pytest.raises(UserError, match=r"empty\.jsonl holds no prompts"):
        read_prompts(write(tmp_path / "empty.jsonl", "", ""))


def test_results_are_written_beside_what_came_with_the_prompt(
    saved: Path, checkpoint: ColaCheckpoint, tmp_path: Path
) -> None:
    file = write(
        tmp_path / "p.jsonl",
        '{"prompt": "w5 w6", "id": "a"}',
        '{"input_ids": [4, 5, 6], "note": "é"}',
    )
    sample(saved, None, file, tmp_path / "out.jsonl", "cpu", CONFIG)
    text = (tmp_path / "out.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    expected = generate(checkpoint, ["w5 w6", [4, 5, 6]], CONFIG)
    given = [{"prompt": "w5 w6", "id": "a"}, {"input_ids": [4, 5, 6], "note": "é"}]
    for row, keys, result in zip(rows, given, expected, strict=True):
        assert row == {
            **keys,
            "text": result.text,
            "token_ids": result.token_ids,
            "prompt_ids": result.prompt_ids,
            "finish_reason": result.finish_reason,
        }
    assert "é" in text


def test_results_are_shown_on_the_screen(
    saved: Path, checkpoint: ColaCheckpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    sample(saved, ["w5 w6", ""], None, None, "cpu", CONFIG)
    one, two = generate(checkpoint, ["w5 w6", ""], CONFIG)
    assert (
        capsys.readouterr().out
        == f"w5 w6|{one.text}\n[length, 4 tokens]\n\n|{two.text}\n[length, 4 tokens]\n\n"
    )


def test_what_a_terminal_cannot_show_is_escaped(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(terminal, "ascii"))
    assert main(["sample", str(saved), "--prompt", "café", "max_new_tokens=1", "num_steps=1"]) == 0
    sys.stdout.flush()
    assert terminal.getvalue().startswith(b"caf\\xe9|")


PROMPTS = [
    {"prompt": "w5 w6", "id": "a"},
    {"input_ids": [4, 5, 6], "text": "to be replaced"},
    {"prompt": "w5 w6", "id": "a"},
    {"prompt": ""},
    {"prompt": "w9", "note": [1.5, None, {"é": "\u2028"}]},
]


class StoppedError(Exception):
    """As if it were killed."""


def stopped_after(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next samplings end after so many results."""
    write_one = ResultFile.append
    left = count

    def append(self: ResultFile, *row: Any) -> None:
        nonlocal left
        if left == 0:
            raise StoppedError
        left -= 1
        write_one(self, *row)

    monkeypatch.setattr(ResultFile, "append", append)


@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize("count", range(6))
@pytest.mark.parametrize("cut", [0, 1, 7])
def test_the_same_command_goes_on_and_comes_to_the_same_file(
    saved: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    batch_size: int,
    count: int,
    cut: int,
) -> None:
    file = write(tmp_path / "p.jsonl", *map(json.dumps, PROMPTS))
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    config = dataclasses.replace(CONFIG, temperature=1.0, batch_size=batch_size)
    sample(saved, None, file, whole, "cpu", config)
    with monkeypatch.context() as patch, contextlib.suppress(StoppedError):
        stopped_after(count, patch)
        sample(saved, None, file, out, "cpu", config)
    there = out.read_bytes()
    assert there == b"".join(whole.read_bytes().splitlines(keepends=True)[:count])
    (tmp_path / ".out.jsonl.0123456789abcdef").touch()
    (tmp_path / ".out.jsonl.settings.json.0123456789abcdef").touch()
    if cut and there:
        # as if the last line had not come to the disk as a whole
        out.write_bytes(there[:-cut])
    for _ in range(2):  # and once more, when nothing is left to do
        sample(saved, None, file, out, "cpu", dataclasses.replace(config, batch_size=2))
        assert out.read_bytes() == whole.read_bytes()
    names = {path.name for path in tmp_path.iterdir()} - {"saved"}
    settings = {f"{name}.jsonl.settings.json" for name in ("whole", "out")}
    assert names == {"p.jsonl", "whole.jsonl", "out.jsonl"} | settings


def test_lines_that_were_taken_out_are_made_anew(saved: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "p.jsonl", *(json.dumps({"prompt": f"w{n}"}) for n in range(4, 9)))
    out = tmp_path / "out.jsonl"
    sample(saved, None, file, out, "cpu", CONFIG)
    whole = out.read_bytes()
    lines = whole.splitlines(keepends=True)
    out.write_bytes(b"".join(lines[number] for number in (4, 1, 1)))
    sample(saved, None, file, out, "cpu", CONFIG)
    assert out.read_bytes() == whole


def test_other_settings_or_prompts_are_refused_by_name(saved: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    sample(saved, ["w5"], None, out, "cpu", CONFIG)
    before = out.read_bytes()
    for texts, changes, message in (
        (["w5"], {"seed": 3}, r"differs in: sampler\.seed \(0 there, 3 here\)\. Give another file"),
        (["w5", "w6"], {}, r"differs in: prompts\.count \(1 there, 2 here\); prompts\.sha256"),
        (["w6"], {}, r"differs in: prompts\.sha256"),
    ):
        with pytest.raises(UserError, match=rf"out\.jsonl holds the results of .* {message}"):
            sample(saved, texts, None, out, "cpu", dataclasses.replace(CONFIG, **changes))
    tiny_checkpoint(tiny_vae(), tiny_dit(seed=9)).save(tmp_path / "other")
    with pytest.raises(UserError, match=r"differs in: checkpoint\.weights_xxh3"):
        sample(tmp_path / "other", ["w5"], None, out, "cpu", CONFIG)
    assert out.read_bytes() == before


def test_all_prompts_are_checked_before_any_work(saved: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "p.jsonl", '{"prompt": "w5"}', '{"input_ids": [4, 99]}')
    with pytest.raises(UserError, match=r"p\.jsonl, prompt 2: id 99 at position 1 is outside the"):
        sample(saved, None, file, tmp_path / "out.jsonl", "cpu", CONFIG)
    assert not [*tmp_path.glob("out*")]


def test_a_file_without_results_is_free_for_another_command(saved: Path, tmp_path: Path) -> None:
    """A failure before the first result leaves nothing that must be kept."""
    out = tmp_path / "out.jsonl"
    tiny_checkpoint(tiny_vae(), None).save(tmp_path / "stage1")
    with pytest.raises(UserError, match="This checkpoint holds a VAE only"):
        sample(tmp_path / "stage1", ["w5"], None, out, "cpu", CONFIG)
    assert out.read_bytes() == b""
    sample(saved, ["w5"], None, out, "cpu", CONFIG)
    assert len(out.read_bytes().splitlines()) == 1


@pytest.mark.parametrize("when", ["model", "work"])
def test_a_file_that_appears_meanwhile_is_kept(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    out = tmp_path / "out.jsonl"
    place = (
        f"cola_train.evaluation.writing.sample.{'load_checkpoint' if when == 'model' else 'tqdm'}"
    )
    real: Any = pkgutil.resolve_name(place)

    def meanwhile(*given: Any, **named: Any) -> Any:
        out.write_text("mine\n")
        return real(*given, **named)

    monkeypatch.setattr(place, meanwhile)
    message = "exists and is not overwritten" if when == "model" else "line 1 is no result of this"
    with pytest.raises(UserError, match=rf"out\.jsonl.* {message}"):
        sample(saved, ["w5"], None, out, "cpu", CONFIG)
    assert out.read_text().startswith("mine\n")
    assert when == "work" or not (tmp_path / "out.jsonl.settings.json").exists()


@pytest.mark.parametrize("text", ["mine", "{}", '{"checkpoint"', "[]"])
def test_a_file_in_the_place_of_the_settings_is_kept(
    saved: Path, tmp_path: Path, text: str
) -> None:
    (tmp_path / "out.jsonl.settings.json").write_text(text)
    with pytest.raises(UserError, match=r"Cannot read .*out\.jsonl\.settings\.json .*--out"):
        sample(saved, ["w5"], None, tmp_path / "out.jsonl", "cpu", CONFIG)
    assert [path.read_text() for path in tmp_path.glob("out*")] == [text]


def test_what_a_full_disk_refuses_is_told_and_done_by_the_next_call(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    out = tmp_path / "out.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(JsonlWriter, "_write", full)
        with (
            pytest.warns(UserWarning, match="Cannot write"),
            pytest.raises(
                UserError, match=r"Not all results could be written .* \(0 of 2\)\. Make"
            ),
        ):
            sample(saved, ["w5", "w6"], None, out, "cpu", CONFIG)
    sample(saved, ["w5", "w6"], None, out, "cpu", CONFIG)
    assert len(out.read_bytes().splitlines()) == 2


def test_an_output_that_exists_is_kept(saved: Path, tmp_path: Path) -> None:
    out = write(tmp_path / "out.jsonl", "precious")
    with pytest.raises(
        UserError, match=r"out\.jsonl exists and is not overwritten; choose another --out"
    ):
        sample(saved, ["w5"], None, out, "cpu", CONFIG)
    assert out.read_text(encoding="utf-8") == "precious\n"


@pytest.mark.parametrize("device", ["nonsense", "cuda:99"])
def test_a_device_that_is_not_there(saved: Path, device: str) -> None:
    with pytest.raises(
        UserError, match=rf"--device {device} is not usable here \(.*\); try cpu, cuda or auto"
    ):
        sample(saved, ["w5"], None, None, device, CONFIG)
