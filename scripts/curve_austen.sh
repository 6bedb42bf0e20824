#!/usr/bin/env bash
# The scaling curves of docs/scaling.md: Cola DLM, autoregressive and LLaDA, three sizes and four budgets each, on six novels.
#   bash scripts/curve_austen.sh           trains and measures what is missing, fits, draws: checkpoints/curve-austen/
#   bash scripts/curve_austen.sh --smoke   the same path in a few minutes; its points mean nothing
set -euo pipefail
spec=configs/small/curve_austen.yaml
[ "${1:-}" = "--smoke" ] && spec=configs/small/curve_smoke.yaml
source "$(dirname "$0")/setup.sh"
# Two runs at a time, a thread each.
export OMP_NUM_THREADS=1

book=cola_train/data/austen.txt.xz
cola-train tokenizer train out=data/austen-1024.json "corpus.inputs=[$book]" vocab_size=1024
cola-train prepare out=data/austen-1024-64 tokenizer=data/austen-1024.json "corpus.inputs=[$book]" seq_len=64 held_out_share=0.03
cola-train curve run "$spec" --parallel 2
cola-train curve fit "$spec"
cola-train curve plot "$spec"
