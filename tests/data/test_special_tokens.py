"""Tokenizers whose end and padding tokens have other names, from a text to a sample of a run."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

from cola_train.config.data import CorpusConfig, PrepareConfig
from cola_train.config.load import load_config
from cola_train.config.run import RunConfig
from cola_train.config.sampling import SamplerConfig
from cola_train.config.settings import UserError
from cola_train.data.packing import TRAIN
from cola_train.data.prepare import prepare
from cola_train.data.prepared import PreparedData
from cola_train.data.special_tokens import NAMES_FILE, SpecialTokens, with_padding
from cola_train.data.tokenizer import Tokenizer
from cola_train.evaluation.writing.words import first_word
from cola_train.families.generate import generate
from cola_train.families.registry import load_checkpoint
from cola_train.training.run import train
from tests.helpers.runs import SMALL, SMALL_TRANSFORMER

TEXTS = [
    f"It was the {word} of times, caf\u00e9 number {n}." for n, word in enumerate("abcdef" * 20)
]


def llama_like() -> tokenizers.Tokenizer:
    """As sentencepiece's are converted: bytes as a last resort, blanks as U+2581, no padding."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581"]
    letters = "abcdefghijklmnopqrstuvwxyzI.,0123456789"
    pieces = ["\u2581t", "he", "\u2581the", "as"]
    vocab = {word: number for number, word in enumerate([*words, *letters, *pieces])}
    merges = [("\u2581", "t"), ("h", "e"), ("\u2581t", "he"), ("a", "s")]
    model = models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    library = tokenizers.Tokenizer(model)
    prepend = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    library.normalizer = normalizers.Sequence(prepend)
    library.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    library.add_special_tokens(
        [AddedToken(word, normalized=False) for word in ("<unk>", "<s>", "</s>")]
    )
    return library


def gpt2_like() -> tokenizers.Tokenizer:
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    library.train_from_iterator(TEXTS, trainer)
    return library


KINDS = {"llama": (llama_like, "</s>"), "gpt2": (gpt2_like, "<|endoftext|>")}


def prepared(kind: str, folder: Path, **changes: Any) -> PreparedData:
    make, eos = KINDS[kind]
    (folder / "tokenizer.json").write_text(make().to_str(), encoding="utf-8")
    (folder / "a.txt").write_text("\n\n".join(TEXTS), encoding="utf-8")
    names = {"eos_token": eos, **changes}
    corpus = CorpusConfig(inputs=[str(folder / "a.txt")])
    tokenizer = str(folder / "tokenizer.json")
    config = PrepareConfig(
        out=str(folder / "rows"), tokenizer=tokenizer, corpus=corpus, seq_len=32,
        held_out_share=0.1, **names,
    )  # fmt: skip
    return prepare(config)


@pytest.mark.parametrize("kind", KINDS)
def test_the_padding_token_is_added_with_the_next_free_id(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = prepared(kind, tmp_path)
    library = KINDS[kind][0]()
    ids = library.get_vocab(with_added_tokens=True)
    tokenizer = data.tokenizer
    assert tokenizer.pad_token_id == max(ids.values()) + 1 == data.manifest.pad_token_id
    assert tokenizer.eos_token_id == ids[KINDS[kind][1]] == data.manifest.eos_token_id
    assert data.manifest.vocab_size == tokenizer.vocab_size == tokenizer.pad_token_id + 1
    assert (
        capsys.readouterr().err.count(f"is added to the copy as id {tokenizer.pad_token_id}") == 1
    )
    # Texts have the ids that they had, and none can forge the new one.
    for text in TEXTS:
        assert tokenizer.encode_document(text) == library.encode(text, add_special_tokens=False).ids
    assert tokenizer.pad_token_id not in tokenizer.encode_document("a <|pad|> b")
    rows = [data.row(TRAIN, index)[0] for index in range(data.num_rows(TRAIN))]
    ends = sum(int((row == tokenizer.eos_token_id).sum()) for row in rows)
    # The last of them may lie in what fills no row.
    assert 0 <= data.manifest.splits[TRAIN].num_documents - ends <= 3
    # The same again has nothing to do.
    assert prepared(kind, tmp_path).tokenizer.sha256 == tokenizer.sha256


@pytest.mark.parametrize("kind", KINDS)
def test_names_survive_wherever_the_tokenizer_goes(kind: str, tmp_path: Path) -> None:
    tokenizer = prepared(kind, tmp_path).tokenizer
    (tmp_path / "copy").mkdir()
    assert tokenizer.save(tmp_path / "copy" / "tokenizer.json")
    assert not tokenizer.save(tmp_path / "copy" / "tokenizer.json")
    for again in (
        Tokenizer.load(tmp_path / "copy"),
        pickle.loads(pickle.dumps(tokenizer)),
        Tokenizer.load(tmp_path / "rows" / "tokenizer.json"),
    ):
        assert again.special_tokens == SpecialTokens(KINDS[kind][1], "<|pad|>")
        assert (again.sha256, again.eos_token_id) == (tokenizer.sha256, tokenizer.eos_token_id)
    # Usual names need no file; others are part of what a tokenizer is.
    assert (tmp_path / "copy" / NAMES_FILE).exists() == (kind == "llama")
    names = SpecialTokens(*reversed(tokenizer.special_tokens))
    other = Tokenizer(tokenizer.content, "t", names)
    assert other.sha256 != tokenizer.sha256
    (tmp_path / "copy" / NAMES_FILE).write_text(tokenizer.special_tokens.to_json())
    with pytest.raises(UserError, match="names other special tokens"):
        other.save(tmp_path / "copy" / "tokenizer.json")


def test_names_may_be_written_as_hugging_face_does(tmp_path: Path) -> None:
    tokenizer = prepared("llama", tmp_path).tokenizer
    names = {"eos_token": {"content": "</s>", "lstrip": False}, "pad_token": "<|pad|>"}
    (tmp_path / "rows" / NAMES_FILE).write_text(json.dumps(names))
    assert Tokenizer.load(tmp_path / "rows").sha256 == tokenizer.sha256
    (tmp_path / "rows" / NAMES_FILE).write_text("[1]")
    with pytest.raises(UserError, match=r"is no tokenizer_config\.json"):
        Tokenizer.load(tmp_path / "rows")


@pytest.mark.parametrize(
    "kind, changes, message",
    [
        ("llama", {"eos_token": "<|endoftext|>"}, "no token <.endoftext.>.*eos_token=.*<unk>, <s>"),
        (
            "llama",
            {"pad_token": "</s>"},
            r"pad_token must be another token than eos_token \(</s>\)",
        ),
        ("llama", {"pad_token": "as"}, "as is a token that a text can give.*pad_token="),
        ("llama", {"pad_token": "<unk>"}, "<unk> is a token that a text can give"),
        ("gpt2", {"pad_token": "a"}, "a is a token that a text can give"),
        ("gpt2", {"eos_token": "</s>"}, "no token </s>, which is to end every document"),
    ],
)
def test_names_that_cannot_be_are_refused(
    kind: str, changes: dict[str, str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        prepared(kind, tmp_path, **changes)
    assert not (tmp_path / "rows").exists()


def test_a_special_token_that_is_there_can_be_the_padding(tmp_path: Path) -> None:
    tokenizer = prepared("llama", tmp_path, pad_token="<s>").tokenizer
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 1)
    assert tokenizer.content == (tmp_path / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stage", ["vae", "ar"])
def test_a_run_keeps_them_to_its_export_and_samples(
    kind: str, stage: str, tmp_path: Path, vae_config: Callable[..., RunConfig]
) -> None:
    data = prepared(kind, tmp_path)
    place = [f"data.path={tmp_path / 'rows'}", f"runs_folder={tmp_path}", "trainer.max_steps=2"]
    place += ["optim.decay=4", "trainer.validate_every_steps=0"]
    size = data.tokenizer.vocab_size
    if stage == "vae":
        config = vae_config("run", *place, f"vae.vocab_size={size}")
    else:
        from cola_train.families.registry import family_named

        common = [text for text in SMALL if not text.startswith("vae.")]
        config = load_config(
            family_named("ar").config,
            None,
            [*common, *SMALL_TRANSFORMER, "name=run", *place, f"transformer.vocab_size={size}"],
        )
    assert train(config).state == "finished"
    checkpoint = load_checkpoint(tmp_path / "run")
    for tokenizer in (checkpoint.tokenizer, Tokenizer.load(tmp_path / "run" / "tokenizer.json")):
        assert tokenizer.sha256 == data.manifest.tokenizer_sha256
        assert tokenizer.eos_token_id == data.manifest.eos_token_id
        assert tokenizer.encode("the caf\u00e9") == data.tokenizer.encode("the caf\u00e9")
    assert train(config).state == "finished"  # resumed: nothing differs
    if stage == "ar":
        result = generate(checkpoint, ["It was"], SamplerConfig(max_new_tokens=4))[0]
        assert result.prompt_ids == data.tokenizer.encode("It was")
        told = json.loads((tmp_path / "run" / "hf" / NAMES_FILE).read_text())
        assert (told["eos_token"], told["pad_token"]) == data.tokenizer.special_tokens


def with_both(kind: str) -> Tokenizer:
    make, eos = KINDS[kind]
    names = SpecialTokens(eos, "<|pad|>")
    return Tokenizer(with_padding(make().to_str().encode(), names, kind), special_tokens=names)


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_continuation_keeps_the_space_that_it_begins_with(cut: int) -> None:
    """SentencePiece's decoders drop it at the start of a text, and a continuation is none."""
    tokenizer = with_both("llama")
    ids = tokenizer.encode("It was the best of times")
    before, new = ids[:cut], ids[cut:]
    assert tokenizer.decode(before) + tokenizer.decode(new, after=before) == tokenizer.decode(ids)
    assert tokenizer.decode(ids) == "It was the best of times"
    word = tokenizer.decode(new, after=before).lower().split()[0]
    is_whole = tokenizer.decode(new, after=before)[0] == " "
    assert first_word(new, tokenizer, before) == (word if is_whole else None)


GPT2 = with_both("gpt2")


@given(st.text(max_size=12), st.text(max_size=12), st.integers(0, 40))
def test_a_byte_level_continuation_is_what_its_own_ids_say(one: str, other: str, cut: int) -> None:
    ids = GPT2.encode_document(one + other)
    assert GPT2.decode(ids[cut:], after=ids[:cut]) == GPT2.decode(ids[cut:])
