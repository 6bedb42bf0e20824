"""What is said of a key that a config does not have, and of a value that is to be a list."""

from pathlib import Path

import pytest

from cola_train.cli import main, make_parser
from cola_train.cli.config_docs import settings_verbs
from cola_train.config.data import PrepareConfig
from cola_train.config.describe import describe
from cola_train.config.hints import USUAL_NAMES, meant
from cola_train.config.load import build_config, load_config
from cola_train.config.sampling import SamplerConfig
from cola_train.config.settings import UserError
from cola_train.data.sources import expand_inputs
from cola_train.families.cola.config import JointRunConfig, VAERunConfig

KEYS = {
    verb: [entry.key for entry in describe(config_class)]
    for verb, config_class in settings_verbs(make_parser())
}


@pytest.mark.parametrize(
    "key, known",
    [
        ("lr", "optim.learning_rate"),
        ("optim.lr", "optim.learning_rate"),
        ("trainer.lr", "optim.learning_rate"),
        ("learning-rate", "optim.learning_rate"),
        ("optim.max_steps", "trainer.max_steps"),
        ("wd", "optim.weight_decay"),
        ("steps", "trainer.max_steps"),
        ("epochs", "trainer.max_steps"),
        ("optimizer.learning_rate", "optim.learning_rate"),
        ("optim.warmup_steps", "optim.warmup"),
        ("optim.learnin_rate", "optim.learning_rate"),
        ("optim.learnin_rte", "optim.learning_rate"),
        ("seq_length", "data.seq_len"),
        ("gpus", "parallel.num_processes"),
        ("precison", "trainer.precision"),
        ("in_loop_eval.benchmarks.choose", "in_loop_eval.benchmarks.choose_by"),
        # Not what merely looks like it: whoever followed that would set another thing.
        ("kl_weight", "objective.entropy_weight"),
        ("objective.kl_weight", "objective.entropy_weight"),
        ("xyzzy", None),
        ("optim.xyz", None),
    ],
)
def test_the_last_part_says_what_is_meant(key: str, known: str | None) -> None:
    assert meant(key, KEYS["joint"]) == ([known] if known else [])


def test_a_word_with_two_meanings_gets_both_and_each_verb_its_own() -> None:
    assert meant("batch_size", KEYS["vae"]) == [
        "trainer.global_batch_size",
        "trainer.micro_batch_size",
    ]
    assert meant("in_loop_eval.batch_size", KEYS["vae"])[0].startswith("in_loop_eval.")
    assert meant("steps", KEYS["sample"]) == ["num_steps"]
    assert meant("steps", KEYS["evaluate"]) == ["sampler.num_steps"]
    assert meant("lr", KEYS["sample"]) == []
    assert meant("data", KEYS["prepare"]) == ["corpus.inputs"]
    assert meant("data", KEYS["ar"]) == ["data.path"]
    assert meant("layers", KEYS["ar"]) == ["transformer.num_hidden_layers"]


def test_every_usual_name_means_settings_that_exist() -> None:
    everything = [f".{key}" for keys in KEYS.values() for key in keys]
    for name, alternatives in USUAL_NAMES.items():
        for ending in [ending for group in alternatives for ending in group]:
            assert any(key.endswith(f".{ending}") for key in everything), (name, ending)


@pytest.mark.parametrize(
    "override, end",
    [
        ("lr=1e-3", "did you mean 'optim.learning_rate'?"),
        ("optim.lr=1e-3", "did you mean 'optim.learning_rate'?"),
        (
            "batch_size=8",
            "did you mean 'trainer.global_batch_size' or 'trainer.micro_batch_size'?",
        ),
        ("optmi={eps: 1, beta1: 0}", "did you mean 'optim'?"),
        ("data.pth=x", "did you mean 'data.path'?"),
        ("data.xyz=x", "allowed: data.num_workers, data.path, data.seq_len"),
    ],
)
def test_the_message_ends_with_it(override: str, end: str) -> None:
    with pytest.raises(UserError) as refused:
        load_config(JointRunConfig, None, [override])
    key = override.partition("=")[0]
    assert str(refused.value) == f"Unknown config key '{key}' in the override '{override}'; {end}"


def test_files_get_the_same_hints() -> None:
    with pytest.raises(UserError, match=r"'optim\.lr' in a.yaml; did you mean 'optim.learning"):
        build_config(VAERunConfig, {"optim": {"lr": "1", "eps": "1"}}, "a.yaml")
    with pytest.raises(UserError, match=r"'training' in a.yaml; did you mean 'trainer'\?"):
        build_config(VAERunConfig, {"training": {"max_steps": "1", "lr": "1"}}, "a.yaml")


@pytest.mark.parametrize(
    "override, typed",
    [
        ("corpus.inputs=ok.jsonl", "'corpus.inputs=[ok.jsonl]'"),
        ("corpus.inputs=a.txt,b.txt", "'corpus.inputs=[a.txt, b.txt]'"),
        ("corpus.inputs=no", "\"corpus.inputs=['no']\""),
        ("corpus.inputs=a[1].txt", "\"corpus.inputs=['a[1].txt']\""),
    ],
)
def test_what_is_given_alone_for_a_list_is_shown_as_one(override: str, typed: str) -> None:
    with pytest.raises(UserError) as refused:
        load_config(PrepareConfig, None, [override])
    assert str(refused.value).endswith(f"; write a list: {typed}.")
    # What is said works.
    inputs = load_config(PrepareConfig, None, ["out=o", "tokenizer=t", typed[1:-1]]).corpus.inputs
    assert ",".join(inputs) == override.partition("=")[2]


def test_a_list_of_numbers_is_shown_without_quotes() -> None:
    with pytest.raises(UserError, match=r"write a list: 'eos_token_ids=\[3\]'\.$"):
        load_config(SamplerConfig, None, ["eos_token_ids=3"])
    with pytest.raises(UserError, match=r"must be a list, .* not 0.5\.$"):
        load_config(SamplerConfig, None, ["guidance_interval=0.5"])
    with pytest.raises(UserError, match=r"'eos_token_ids' in a.yaml .*write a list: \[3\]\.$"):
        build_config(SamplerConfig, {"eos_token_ids": "3"}, "a.yaml")


def test_names_with_brackets_need_quotes_in_a_list() -> None:
    with pytest.raises(UserError) as refused:
        load_config(PrepareConfig, None, ["corpus.inputs=[we[i]rd, a.txt]"])
    assert "is not valid YAML" in str(refused.value)
    assert "Put quotes around a name or text with [ ] { } : # or a comma" in str(refused.value)
    said = str(refused.value).rpartition(": ")[2].removesuffix(".").strip('"')
    assert said == "corpus.inputs=['we[i]rd', a.txt]"
    config = load_config(PrepareConfig, None, ["out=o", "tokenizer=t", said])
    assert config.corpus.inputs == ["we[i]rd", "a.txt"]
    with pytest.raises(UserError, match=r"must be a single value.*Put quotes around"):
        load_config(PrepareConfig, None, ["corpus.inputs=[a: b]"])


def test_what_only_a_glob_can_mean_is_said(tmp_path: Path) -> None:
    (tmp_path / "we[i]rd").mkdir()
    path = tmp_path / "we[i]rd" / "a,b.jsonl"
    path.write_text("{}\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"matches no file; \[ \] are glob characters") as refused:
        expand_inputs([f"{tmp_path}/we[i]rd/*.jsonl"])
    said = str(refused.value).rpartition(" as in ")[2]
    assert expand_inputs([said])[0] == [path]
    with pytest.raises(UserError, match=r"quotes around a name with a comma: .*\"a,b\.jsonl\""):
        expand_inputs([str(path.with_name("a"))])


def test_a_first_argument_that_is_a_file_is_a_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=1e-3").mkdir()
    (tmp_path / "lr=1e-3" / "a.yaml").write_text("name: a\ndata: {path: no}\nvae: {block_size: 1}")
    assert main(["vae", "lr=1e-3/a.yaml"]) == 2
    assert "There is no prepared data folder no" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["vae", "--resume", "file"],
        ["export", "file"],
        ["sample", "file", "--prompt", "a"],
        ["compare", "file"],
        ["runs", "file"],
        ["branch", "file", "name=b"],
        ["vae", "name=a", "vae.block_size=1", "data.path=file"],
    ],
)
def test_a_file_where_a_folder_is_needed_is_called_one(
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert "is a file" in said
    assert "give a" in said
    assert "folder" in said


@pytest.mark.parametrize(
    "flag, setting",
    [("--lr=3", "optim.learning_rate=3"), ("--max-steps", "trainer.max_steps=VALUE")],
)
def test_settings_with_dashes_are_known_by_their_usual_names(
    flag: str, setting: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["vae", flag])
    assert f"; settings are key=value, without --: {setting}\n" in capsys.readouterr().err
