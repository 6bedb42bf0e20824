"""Random configs of every verb, drawn from the types and rules of its settings, and what becomes
of them. As a program it loads as many as it is told, in a process that cannot import torch:

    python -m tests.config.drawn NUMBER

prints a JSON list of [verb, overrides, message of the refusal or null].
"""

import importlib.abc
import json
import sys
import types
import typing
from collections.abc import Sequence
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

# What must be given, and sizes at which anything that is accepted takes seconds.
RUN = [
    "name=drawn", "data.path=rows", "data.seq_len=32", "trainer.precision=fp32",
    "trainer.accelerator=cpu", "trainer.global_batch_size=4", "trainer.micro_batch_size=2",
    "trainer.max_steps=2", "optim.warmup=1", "optim.decay=4",
]  # fmt: skip
VAE = [
    "vae.vocab_size=320", "vae.dim=16", "vae.ffn_dim=32", "vae.num_heads=2", "vae.latent_dim=8",
    "vae.encoder_num_blocks=1", "vae.decoder_num_blocks=1", "vae.block_size=1",
]  # fmt: skip
DIT = [
    "dit.txt_dim=16", "dit.emb_dim=16", "dit.heads=2", "dit.head_dim=8", "dit.rope_dim=4",
    "dit.num_layers=1", "dit.txt_in_channels=8", "dit.txt_out_channels=8",
    "objective.reference_weight=0",
]  # fmt: skip
TRANSFORMER = [
    "transformer.vocab_size=320", "transformer.hidden_size=16", "transformer.intermediate_size=32",
    "transformer.num_attention_heads=2", "transformer.head_dim=8",
    "transformer.num_hidden_layers=1",
]  # fmt: skip
FAMILIES = "families={ar: {config: a.yaml, sizes: {s: [seed=1]}}}"
BASES = {
    "vae": [*RUN, *VAE],
    "joint": [*RUN, *VAE, *DIT],
    "distill": [*RUN, *VAE, *DIT, "teacher_from=t", "objective.vae_strategy.mode=fix"],
    "ar": [*RUN, *TRANSFORMER],
    "llada": [*RUN, *TRANSFORMER],
    "tokenizer train": ["out=t.json", "corpus.inputs=[a.txt]"],
    "prepare": ["out=o", "tokenizer=t.json", "corpus.inputs=[a.txt]"],
    "curve run": ["folder=f", FAMILIES, "budgets=[1]"],
    "study run": ["folder=f", "config=a.yaml", "trials={base: {}}"],
}
# Verbs of the config class of another.
OF_OTHERS = ("curve fit", "curve plot", "study table")
RUNS = ("vae", "joint", "ar", "llada")
AMOUNTS = ["0", "1", "2", "3 steps", "4", "64 tokens", "500 tokens", "1e-9 EFLOPs", "1e-8 EFLOPs",
           "7 weeks", "1.5"]  # fmt: skip
# Bounds of this test, no rules: larger ones are as right, and take memory or time.
SIZES = {
    "seq_len": [8, 12, 32, 33], "vocab_size": [1, 100, 320, 321], "global_batch_size": [1, 4, 6],
    "micro_batch_size": [1, 2, 3], "max_steps": [1, 2], "num_processes": [1, 2, 3],
    "shard_size": [1, 2, 3], "num_workers": [0, 1], "dim": [8, 16, 20], "ffn_dim": [1, 2, 32],
    "latent_dim": [1, 8], "patch_size": [1, 2, 4], "num_heads": [1, 2, 3],
    "block_size": [1, 2, 3, 4, 16], "heads": [1, 2, 3], "head_dim": [1, 2, 4, 8],
    "rope_dim": [2, 3, 4, 8, 10], "txt_dim": [8, 16], "emb_dim": [8, 16], "num_layers": [1, 2],
    "expand_ratio": [1, 4], "encoder_num_blocks": [1, 2], "decoder_num_blocks": [1, 2],
    "txt_in_channels": [1, 8], "txt_out_channels": [1, 8], "hidden_size": [1, 8, 15, 16],
    "intermediate_size": [1, 32], "num_hidden_layers": [1, 2], "num_attention_heads": [1, 2, 3],
    "noise_copies": [1, 2, 3], "validation_rows": [0, 1, 5], "batch_size": [1, 2, 7],
    "num_samples": [1, 2], "num_rows": [2, 3], "max_new_tokens": [1, 2, 5],
    "num_steps": [1, 2, 3], "map_latents": [3, 50],
    "warmup": AMOUNTS, "decay": AMOUNTS, "anneal": AMOUNTS,
    "marks": ["[]", "[1]", "[every 2 steps, 64 tokens]", "[every 0]", "[every 1e-9 EFLOPs]"],
}  # fmt: skip
TEXTS = {
    "name": ["b", "", ".", "a/b", "c d", "x" * 300, "a\0b", "\u00e9\U0001f600"],
    "runs_folder": ["runs", "a/b", "r\0s"],
    "sample_prompts": ["[]", "[a]", "['', It was]"],
    "evaluators": ["[]", "[inspection]", "[likelihood]", "[inspection, likelihood]", "[inspecton]"],
    "tasks": ["[]", "[all]", "[lambada]", "[lambda]", "[all, lambada]"],
    "inputs": ["[]", "[a.txt, b.txt]"],
    "dataset": ["null", "d"],
    "budgets": ["[]", "[1, 2]", "[0]", "[1, 1]", "[1e-30]"],
    "eos_token_ids": ["null", "[]", "[0]", "[3, 319]", "[320]", "[-1]", "[1000000]"],
    "pad_token_id": ["null", "0", "319", "320", "1000000", "-1"],
    "guidance_interval": ["[0, 1]", "[0.3, 0.3]", "[1, 0]", "[0]", "[-1, 1]", "[0.2, 0.9]"],
}
# What names something on this machine, or makes a run be of another.
LEFT_OUT = {
    "path", "warm_start_from", "branched_from", "init_vae_from", "init_dit_from", "stage",
    "teacher_from",
    "benchmark_data", "enabled", "families", "trials", "comparisons", "settings", "compile",
    "workload", "device", "accelerator",
}  # fmt: skip
WHOLE = [-1, 0, 1, 2, 3, 7, 10, 16, 99, 100, 260, 2**62, 2**63 - 1, 2**63]
REAL = [-1.0, -1e-6, 0.0, 1e-30, 1e-8, 1e-4, 0.05, 0.5, 0.999, 1.0, 1.5, 7.0, 100.0, 1e30]
NO_NUMBERS = ["many", "inf", "nan", "[1]", "1.5.2"]


def texts_of(key: str, field: Any) -> tuple[list[str], list[str]]:
    """What is typed for a setting: what its declaration allows, and what it does not."""
    last = key.rpartition(".")[2]
    if last in TEXTS:
        return TEXTS[last], []
    if last in SIZES:
        return [str(value) for value in SIZES[last]], NO_NUMBERS if last != "marks" else []
    kind, rule = field.type, field.metadata["rule"]
    inside, outside = [], []
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        (kind,) = [option for option in typing.get_args(kind) if option is not type(None)]
        inside.append("null")
    if typing.get_origin(kind) is typing.Literal:
        return [*inside, *typing.get_args(kind)], ["other"]
    if kind is bool:
        return ["true", "no"], ["maybe", "2"]
    if kind in (int, float):
        for value in WHOLE if kind is int else REAL:
            (inside if rule.holds(value) else outside).append(repr(value))
        return inside, outside + NO_NUMBERS + (["1.5", "1e30"] if kind is int else [])
    if kind is str:
        return [*inside, field.default if isinstance(field.default, str) else "a"], []
    assert typing.get_origin(kind) is list, key
    return [f"[{', '.join(map(str, field.default_factory()))}]"], ["a", "[[1]]", "{a: 1}"]


def choices() -> dict[str, list[tuple[str, list[str], list[str]]]]:
    """For each verb its settings with what may be typed for them."""
    from cola_train.cli import make_parser
    from cola_train.cli.config_docs import settings_verbs
    from cola_train.config.load import leaves

    return {
        verb: [
            (key, *texts_of(key, field))
            for key, field in leaves(config_class)
            if key.rpartition(".")[2] not in LEFT_OUT
        ]
        for verb, config_class in settings_verbs(make_parser())
        if verb not in OF_OTHERS
    }


@st.composite
def drawn(draw: st.DrawFn, known: dict[str, list[tuple[str, list[str], list[str]]]]) -> Any:
    """A verb, the settings given to it, and whether one of them is outside of what it may be."""
    verb = draw(st.sampled_from([*RUNS, *RUNS, *known]))
    changed = draw(st.lists(st.sampled_from(known[verb]), max_size=8, unique_by=lambda one: one[0]))
    is_outside = draw(st.integers(0, 7)) == 0
    overrides = list(BASES.get(verb, []))
    for number, (key, inside, outside) in enumerate(changed):
        texts = outside if is_outside and number == 0 and outside else inside
        overrides.append(f"{key}={draw(st.sampled_from(texts))}")
    return verb, overrides, is_outside and bool(changed) and bool(changed[0][2])


def nested(overrides: Sequence[str]) -> dict[str, Any]:
    """key=value as a file has them: one layer is read sooner than thirty."""
    from cola_train.config.reading import parse

    values: dict[str, Any] = {}
    for text in overrides:
        key, _, value = text.partition("=")
        *sections, last = key.split(".")
        inside = values
        for section in sections:
            inside = inside.setdefault(section, {})
        inside[last] = parse(value, text)
    return values


def outcomes(number: int) -> list[tuple[str, Sequence[str], str | None]]:
    """What loading so many different configs comes to; whatever is no refusal is raised."""
    from cola_train.cli import make_parser
    from cola_train.cli.config_docs import settings_verbs
    from cola_train.config.load import build_config
    from cola_train.config.settings import UserError

    known, classes = choices(), dict(settings_verbs(make_parser()))
    bases = {verb: nested(BASES.get(verb, [])) for verb in known}
    found: dict[str, tuple[str, Sequence[str], str | None]] = {}

    @settings(
        max_examples=number,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(drawn(known))
    def load(one: Any) -> None:
        verb, overrides, is_outside = one
        refusal = None
        try:
            changed = overrides[len(BASES.get(verb, [])) :]
            build_config(classes[verb], bases[verb], "the base", changed)
        except UserError as error:
            refusal = str(error)
        assert refusal is not None or not is_outside, one
        assert refusal is None or "\n" not in refusal, refusal
        found[json.dumps([verb, overrides])] = verb, overrides, refusal

    load()
    return list(found.values())


class _NoTorch(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, *_: Any) -> None:
        if name.partition(".")[0] == "torch":
            raise AssertionError("torch is imported before a run is refused")


def forbid_torch() -> None:
    """Make every later import of torch in this process an error."""
    sys.meta_path.insert(0, _NoTorch())


if __name__ == "__main__":
    forbid_torch()
    json.dump(outcomes(int(sys.argv[1])), sys.stdout)
