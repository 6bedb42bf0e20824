"""Prompt files, line by line, and what the `sample` verb writes."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cola_train.config.sampling import SamplerConfig
from cola_train.config.settings import UserError
from cola_train.evaluation.writing.sample import read_prompts, sample
from cola_train.families.cola.checkpoint import ColaCheckpoint
from cola_train.families.generate import generate

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
