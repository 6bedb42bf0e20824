"""The command line: parse, load the config, hand over. Heavy imports wait until the arguments are known to be right."""

import argparse
import dataclasses
import sys
import textwrap
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from cola_train.config.data import PrepareConfig, TokenizerTrainConfig
from cola_train.config.load import leaves, load_config
from cola_train.config.runs import JointRunConfig, RunConfig, VAERunConfig, load_run_config
from cola_train.config.sampling import SamplerConfig
from cola_train.config.settings import INTERRUPTED, UserError

_CONFIG_METAVAR = "CONFIG.yaml | key=value"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit status.

    0 done, 1 something failed, 2 something the user gave is wrong, 75 stopped by a signal and saved, 130 interrupted at once.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse gives a `*` positional only what stands together: settings may also follow the options.
    if any(argument.startswith("-") for argument in rest) or (rest and not hasattr(options, "settings")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.settings += rest
    options.arguments = arguments
    try:
        return options.run(options) or 0
    except UserError as error:
        print(f"cola-train: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("cola-train: interrupted", file=sys.stderr)
        return 130


def run() -> NoReturn:
    """The program: `main`, and an end that fits how the process was started."""
    try:
        status = main()
    except Exception:
        traceback.print_exc()
        status = 1
    if "torch" in sys.modules:
        from cola_train.training.processes import end_process, launched_by_torchrun

        if launched_by_torchrun():
            end_process(status)
    sys.exit(status)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cola-train",
        description="Train Cola DLM, a continuous latent diffusion language model.",
        epilog="The order of work: tokenizer, prepare, vae (stage 1), joint (stage 2), sample. `cola-train VERB --help` lists a "
        "verb's settings with their defaults.",
    )
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)

    tokenizer = verbs.add_parser("tokenizer", help="make a tokenizer.json: train one, or build OLMo 2's")
    kinds = tokenizer.add_subparsers(title="kinds", metavar="KIND", required=True)
    _add_verb(
        kinds, "train", _tokenizer_train, "train a byte-level BPE on text", TokenizerTrainConfig,
        example="cola-train tokenizer train out=data/tokenizer.json 'corpus.inputs=[my_texts]' vocab_size=4096",
    )  # fmt: skip
    olmo2 = kinds.add_parser("olmo2", help="build the OLMo 2 tokenizer of the paper (needs the extra 'olmo2')")
    olmo2.add_argument("out", type=Path, help="the tokenizer.json to write")
    olmo2.set_defaults(run=_tokenizer_olmo2)

    _add_verb(
        verbs, "prepare", _prepare, "tokenize text into memory-mapped rows", PrepareConfig,
        example="cola-train prepare out=data/austen tokenizer=data/tokenizer.json 'corpus.inputs=[my_texts]' seq_len=512",
    )  # fmt: skip
    _add_training_verb(verbs, "vae", "stage 1: train the Text VAE", VAERunConfig)
    _add_training_verb(verbs, "joint", "stage 2: train VAE and DiT jointly", JointRunConfig)
    warm = verbs.add_parser("warm-start", help="train a new run that begins with the weights of another, and nothing else of it")
    warm.add_argument("source", type=Path, metavar="RUN", help="the run folder whose latest weights to take")
    warm.add_argument("settings", nargs="+", metavar=_CONFIG_METAVAR, help="the new run's config, then overrides")
    warm.set_defaults(run=_warm_start)

    export = verbs.add_parser("export", help="write a run's checkpoint in the released layout")
    export.add_argument("run_folder", type=Path, metavar="RUN", help="a run folder, checkpoints/NAME")
    export.add_argument("--step", type=int, help="which saved step; the latest without it")
    export.add_argument("--out", type=Path, help="the folder to write, which must not exist; RUN/hf without it, replaced")
    export.add_argument("--average", action="store_true", help="the moving average of the weights (ema.decay) instead of them")
    export.add_argument(
        "--max-shard-gb", type=float, default=5.0, help="split weights into files of at most this many GB (%(default)s)"
    )
    export.set_defaults(run=_export)

    sample = _add_verb(
        verbs, "sample", _sample, "generate text from a checkpoint", SamplerConfig,
        example="cola-train sample checkpoints/NAME --prompt 'It is a truth' max_new_tokens=64",
        positionals={"checkpoint": "a folder in the released layout, or a run folder"},
    )  # fmt: skip
    sample.add_argument("--prompt", action="append", help="a text to continue; may be given more than once; '' is from nothing")
    sample.add_argument(
        "--prompts", type=Path, metavar="FILE.jsonl", help='one {"prompt": "..."} (or {"input_ids": [...]}) per line'
    )
    sample.add_argument("--out", type=Path, metavar="FILE.jsonl", help="write results there as JSON lines instead of printing text")
    sample.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto takes a GPU if there is one")

    _add_verb(
        verbs, "report", _report, "one page on what a joint run has learned, from its export and held-out data", SamplerConfig,
        example="cola-train report checkpoints/NAME-vae checkpoints/NAME guidance_scale=3",
        positionals={"vae_run": "the stage-1 run folder", "joint_run": "the stage-2 run folder; the page goes there, report.md"},
    )  # fmt: skip
    audit = verbs.add_parser("audit", help="check from a run's log that every step used the samples it had to, whatever happened")
    audit.add_argument("run_folder", type=Path, metavar="RUN", help="a run folder, checkpoints/NAME")
    audit.set_defaults(run=_audit)

    chaos = verbs.add_parser("chaos", help="kill, stop and damage a small copy of a run, and see whether it comes to the same end")
    chaos.add_argument("settings", nargs="+", metavar=_CONFIG_METAVAR, help="the run's config, of either stage, then overrides")
    chaos.add_argument("--kills", type=int, default=20, metavar="N", help="how many disturbances (%(default)s)")
    chaos.add_argument("--steps", type=int, default=60, metavar="S", help="optimizer steps of each run (%(default)s)")
    chaos.add_argument(
        "--processes",
        type=_counts,
        metavar="N,N,...",
        help="numbers of processes to go round at each restart",
    )
    chaos.add_argument("--seed", type=int, default=0, help="of the kinds and moments of the disturbances (%(default)s)")
    chaos.set_defaults(run=_chaos)

    doctor = verbs.add_parser(
        "doctor", help="what this machine or job offers a training, how fast it is, and what is wrong with it"
    )
    doctor.add_argument("--folder", type=Path, default=Path("checkpoints"), help="where runs lie or will lie (%(default)s)")
    doctor.add_argument(
        "--processes", type=int, default=1, metavar="N",
        help="measure bandwidth between this many processes (%(default)s); torchrun overrules it",
    )  # fmt: skip
    doctor.add_argument("--json", action="store_true", help="one JSON object instead of text")
    doctor.set_defaults(run=_doctor)
    return parser


def _add_verb(
    verbs: Any,
    name: str,
    run: Callable[[argparse.Namespace], int | None],
    summary: str,
    config_class: type,
    example: str,
    positionals: Mapping[str, str] | None = None,
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=f"example:\n  {example}\n\nsettings (key=value, after any YAML file):\n{_settings_table(config_class)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for positional, meaning in (positionals or {}).items():
        parser.add_argument(positional, type=Path, metavar=positional.upper(), help=meaning)
    parser.add_argument("settings", nargs="*", metavar=_CONFIG_METAVAR, help="a config file, then overrides")
    parser.set_defaults(run=run, config_class=config_class)
    return parser


def _add_training_verb(verbs: Any, name: str, summary: str, config_class: type[RunConfig]) -> None:
    parser = _add_verb(verbs, name, _train, summary, config_class, example=f"cola-train {name} configs/{name}_quickstart.yaml")
    parser.add_argument("--resume", type=Path, metavar="RUN", help="go on with this run, by its own config and the overrides")


def _settings_table(config_class: type) -> str:
    lines = []
    for key, field in leaves(config_class):
        if key == "stage":
            continue
        if field.default_factory is not dataclasses.MISSING:
            default = f"{field.default_factory()!r}"
        elif field.default in (dataclasses.MISSING, "???"):
            default = "required"
        else:
            default = "null" if field.default is None else f"{field.default!r}"
        text = f"{field.metadata['help']} [{default}]"
        lines.append(f"  {key}\n" + textwrap.fill(text, 100, initial_indent=" " * 6, subsequent_indent=" " * 6))
    return "\n".join(lines)


def _load(options: argparse.Namespace) -> Any:
    given: list[str] = options.settings
    path = Path(given[0]) if given and "=" not in given[0] else None
    return load_config(options.config_class, path, given[1:] if path else given)


def _tokenizer_train(options: argparse.Namespace) -> None:
    config = _load(options)
    from cola_train.data.tokenizer import train_tokenizer

    train_tokenizer(config)


def _tokenizer_olmo2(options: argparse.Namespace) -> None:
    from cola_train.data.olmo2 import build_olmo2_tokenizer

    build_olmo2_tokenizer(options.out)


def _prepare(options: argparse.Namespace) -> None:
    config = _load(options)
    from cola_train.data.prepare import prepare

    prepare(config)


def _train(options: argparse.Namespace) -> int:
    if options.resume is None:
        config = _load(options)
    else:
        from cola_train.training.run import resume

        config = resume(options.resume, options.config_class, options.settings)
    from cola_train.training.run_folder import saved_config

    if config.warm_start_from is not None and saved_config(config) is None:
        raise UserError(
            f"warm_start_from={config.warm_start_from} is not set by hand, so that no run begins from another by accident: use "
            f"`cola-train warm-start {config.warm_start_from} ...`, or leave the key out."
        )
    return _run_processes(options, config)


def _warm_start(options: argparse.Namespace) -> int:
    from cola_train.training.run import warm_started
    from cola_train.training.run_folder import read_run_config, saved_config

    options.config_class = type(read_run_config(options.source))
    config = _load(options)
    again = dataclasses.replace(config, warm_start_from=str(options.source))
    return _run_processes(options, again if saved_config(again) else warm_started(config, options.source))


def _run_processes(options: argparse.Namespace, config: RunConfig) -> int:
    """Train in this process; or, where several are asked for and torchrun has not started this one, start them."""
    from cola_train.training.processes import launched_by_torchrun
    from cola_train.training.run_folder import folder_of, read_status, status_time

    if config.parallel.num_processes == 1 or launched_by_torchrun():
        from cola_train.training.run import train

        return INTERRUPTED if train(config).state == "interrupted" else 0
    from cola_train.operations.launch import launch
    from cola_train.training.preflight import refuse

    refuse(config)
    before = status_time(folder_of(config))
    status = launch(options.arguments, config.parallel.num_processes, folder_of(config) / "logs")
    now = read_status(folder_of(config))
    if status <= 128 or now is None or status_time(folder_of(config)) == before:
        return status
    # A signal ended it: what the run came to is in the status that it wrote since.
    return {"interrupted": INTERRUPTED, "finished": 0}.get(now.state, status)


def _export(options: argparse.Namespace) -> None:
    from cola_train.training.run import export_run

    print(export_run(options.run_folder, options.step, options.out, int(options.max_shard_gb * 1e9), options.average))


def _sample(options: argparse.Namespace) -> None:
    if (options.prompt is None) == (options.prompts is None):
        raise UserError("Give either --prompt TEXT (as often as you like) or --prompts FILE.jsonl.")
    config = _load(options)
    from cola_train.sampling.prompts import sample

    sample(options.checkpoint, options.prompt, options.prompts, options.out, options.device, config)


def _report(options: argparse.Namespace) -> None:
    config = _load(options)
    from cola_train.evaluation.report import write_report

    print(write_report(options.vae_run, options.joint_run, config))


def _doctor(options: argparse.Namespace) -> int:
    from cola_train.operations.doctor import doctor

    return doctor(options.folder, options.processes, options.json)


def _audit(options: argparse.Namespace) -> int:
    from cola_train.operations.audit import audit

    return audit(options.run_folder)


def _counts(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _chaos(options: argparse.Namespace) -> int:
    config = load_run_config(Path(options.settings[0]), options.settings[1:])
    from cola_train.operations.chaos import chaos

    return chaos(config, options.kills, options.processes, options.steps, options.seed)
