#!/usr/bin/env bash
# From a book to generated text on a small machine: tokenizer, prepared rows, stage 1, stage 2, export, samples, one page of results.
#   bash scripts/quickstart.sh           about 15 minutes on 2 cores
#   bash scripts/quickstart.sh --smoke   the same path in under 2 minutes; its text means nothing
set -euo pipefail
size=quickstart
rows=256
if [ "${1:-}" = "--smoke" ]; then
    size=smoke
    rows=8
fi
source "$(dirname "$0")/setup.sh"

run=$size-$(date +%Y%m%d-%H%M%S)
book=cola_train/data/austen.txt.xz

cola-train tokenizer train out=data/austen-4096.json "corpus.inputs=[$book]" vocab_size=4096
cola-train prepare out=data/austen-64 tokenizer=data/austen-4096.json "corpus.inputs=[$book]" seq_len=64 held_out_share=0.02
cola-train vae "configs/small/vae_$size.yaml" "name=$run-vae"
cola-train joint "configs/small/joint_$size.yaml" "name=$run" "init_vae_from=checkpoints/$run-vae"
# One page: what the VAE keeps, what the prior has learned of it beside yardsticks, and what it writes.
cola-train inspect "checkpoints/$run" --data data/austen-64 --reference "checkpoints/$run-vae" "num_rows=$rows"
cola-train compare "checkpoints/$run" "configs/small/compare_$size.yaml"
cola-train sample "checkpoints/$run" --prompt "It was" --prompt "She could not" --prompt "My dear" max_new_tokens=48 seed=1
