"""Which setting may be meant by a key that a config does not have."""

import difflib
from collections.abc import Sequence

from cola_train.config.describe import describe

# What other programs call it: the endings of our keys, alternatives after "|", the first that a
# config has; of several in one alternative all are meant.
USUAL_NAMES = {
    word: [ending.split() for ending in endings.split("|")]
    for words, endings in {
        "lr learningrate max_lr peak_lr": "learning_rate",
        "start_lr init_lr initial_lr": "start_learning_rate",
        "min_lr final_lr end_lr": "final_learning_rate",
        "lr_schedule scheduler lr_scheduler lr_scheduler_type": "optim.schedule",
        "opt optimiser optimizer_type optimizer_name": "optim.optimizer",
        "warmup_steps num_warmup_steps warm_up": "optim.warmup",
        "wd l2": "weight_decay",
        "beta kl_weight kl": "kl_weight|entropy_weight",
        "betas adam_betas": "beta1 beta2",
        "adam_beta1": "beta1",
        "adam_beta2": "beta2",
        "epsilon adam_eps adam_epsilon": "optim.eps",
        "clip grad_clip clip_grad clip_grad_norm max_grad_norm gradient_clip_val": "gradient_clip",
        "bs batch batchsize batch_size train_batch_size": "global_batch_size micro_batch_size"
        "|batch_size|batch|rows",
        "mbs microbatch micro_batch per_device_batch_size per_device_train_batch_size "
        "grad_accum gradient_accumulation gradient_accumulation_steps accumulation_steps "
        "accumulate_grad_batches": "micro_batch_size",
        "steps n_steps num_steps train_steps total_steps max_train_steps iters iterations "
        "num_iterations max_iters": "max_steps|num_steps|steps",
        "epoch epochs n_epochs num_epochs max_epochs num_train_epochs": "max_steps|num_steps",
        "flops compute max_flops": "budget.eflops|budgets",
        "ctx ctx_len context context_length block_length seq_length sequence_length "
        "max_seq_len max_seq_length": "seq_len",
        "dtype fp16 bf16 fp32 amp mixed_precision": "precision",
        "accelerator device": "accelerator|device",
        "gpus n_gpus num_gpus devices nproc nproc_per_node world_size processes num_proc "
        "n_proc workers n_workers": "num_processes|num_workers",
        "num_workers dataloader_num_workers": "num_workers|num_processes",
        "data dataset data_dir data_path train_data": "data.path|corpus.inputs",
        "input inputs file files text texts path paths": "corpus.inputs|data.path|prompts",
        "output output_dir out_dir output_path": "out|runs_folder",
        "out outdir save_dir checkpoint_dir checkpoints": "out|runs_folder|folder",
        "run run_name exp_name experiment": "name",
        "save_every save_steps save_interval checkpoint_every": "checkpoint.every_steps",
        "log_every logging_steps log_interval log_steps": "log_every_steps",
        "eval_every eval_steps eval_interval val_interval val_every": "validate_every_steps",
        "ema_decay": "ema.decay",
        "ddp fsdp": "parallel.strategy",
        "grad_checkpointing gradient_checkpointing": "activation_checkpointing",
        "random_seed manual_seed": "seed",
        "vocab n_vocab": "vocab_size",
        "layers n_layer n_layers num_layers num_blocks depth": "num_layers encoder_num_blocks "
        "decoder_num_blocks|num_hidden_layers|layers",
        "heads n_head n_heads num_heads": "heads num_heads|num_attention_heads",
        "dim width d_model hidden hidden_dim hidden_size n_embd embed_dim": "txt_dim vae.dim"
        "|hidden_size|widths",
        "ffn ffn_dim d_ff mlp_dim ffn_hidden_size": "ffn_dim|intermediate_size",
        "temp": "temperature",
        "topk": "top_k",
        "topp nucleus": "top_p",
        "cfg cfg_scale guidance": "guidance_scale",
        "max_tokens max_length num_tokens n_tokens length": "max_new_tokens",
        "penalty rep_penalty": "repetition_penalty",
        "eos eos_id eos_token_id stop_ids": "eos_token_ids",
        "pad pad_id": "pad_token_id",
    }.items()
    for word in words.split()
}  # fmt: skip
# Ratios of difflib: other names of one section are as alike as mask_weight is to kl_weight.
_ALIKE, _ALIKE_HERE, _ALIKE_SECTION = 0.8, 0.75, 0.6


def key_hint(key: str, config_class: type, here: Sequence[str], *, is_section: bool) -> str:
    """The end of a message about an unknown key: what may be meant, or else what there is.

    Args:
        key: as it was given, dotted.
        config_class: the whole config.
        here: the keys of the section in which the unknown one stands.
        is_section: whether it holds several keys.
    """
    keys = [entry.key for entry in describe(config_class)]
    starts = {key[:place] for key in keys for place, letter in enumerate(key) if letter == "."}
    above = key.rpartition(".")[0]
    sections = [start for start in sorted(starts) if start.rpartition(".")[0] == above]
    found = [] if is_section else meant(key, keys)
    found = found or _alike(key, sections, _ALIKE_SECTION) or _alike(key, here, _ALIKE_HERE)
    if found:
        return f"did you mean {' or '.join(repr(one) for one in found)}?"
    return f"allowed: {', '.join(sorted(here))}"


def meant(key: str, keys: Sequence[str]) -> list[str]:
    """The settings, of `keys`, that a key may mean; the last part of it decides, as most know it.

    `lr` and `optim.lr` are `optim.learning_rate`.
    """
    key = key.lower().replace("-", "_")
    section, _, last = key.rpartition(".")
    # Who names a section that has such a setting means it.
    within = [known for known in keys if section and known.startswith(f"{section}.")]
    if same := [known for known in within if last == _last(known)]:
        return same[:1]
    for alternative in USUAL_NAMES.get(last, []):
        if found := [key for ending in alternative for key in _ending_in(ending, keys)[:1]]:
            return found
    same = [known for known in keys if last == _last(known)]
    return _shallowest(same)[:1] or _alike(key, within, _ALIKE) or _alike(key, keys, _ALIKE)


def _last(key: str) -> str:
    return key.rpartition(".")[2]


def _ending_in(ending: str, keys: Sequence[str]) -> list[str]:
    return _shallowest([key for key in keys if f".{key}".endswith(f".{ending}")])


def _shallowest(keys: Sequence[str]) -> list[str]:
    """Those nearest to the top first, where the settings are that people change."""
    return sorted(keys, key=lambda key: key.count("."))


def _alike(key: str, keys: Sequence[str], least: float) -> list[str]:
    """The shallowest of those whose last part is most like this key's."""
    lasts = {_last(known) for known in keys}
    close = difflib.get_close_matches(_last(key), sorted(lasts), 1, least)
    return _shallowest([known for known in keys if _last(known) in close])[:1]
