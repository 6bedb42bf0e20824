#!/usr/bin/env bash
# From a book to generated text on a small machine: tokenizer, prepared rows, a Text VAE, a prior over its latents, a prior in the released
# layout, an autoregressive model of the same compute beside them, and a page of results. What was interrupted goes on with the same command.
#   bash scripts/quickstart.sh           about 15 minutes of training on 2 cores
#   bash scripts/quickstart.sh --smoke   the same path in under 2 minutes; its text means nothing
set -euo pipefail
spec=configs/small/study_quickstart.yaml
run=checkpoints/quickstart
if [ "${1:-}" = "--smoke" ]; then
    spec=configs/small/study_smoke.yaml
    run=checkpoints/quickstart-smoke
fi
source "$(dirname "$0")/setup.sh"
# Two runs at a time, a thread each.
export OMP_NUM_THREADS=1

book=cola_train/data/austen.txt.xz
cola-train tokenizer train out=data/austen-4096.json "corpus.inputs=[$book]" vocab_size=4096
cola-train prepare out=data/austen-64 tokenizer=data/austen-4096.json "corpus.inputs=[$book]" seq_len=64 held_out_share=0.02
cola-train study run "$spec" --parallel 2
# The page: what the VAE keeps and what the prior knows beside tables of words and of pairs; what it writes beside AR and real text, by one
# judge; three continuations.
cola-train study table "$spec" --by-figure
grep "^The prior knows" "$run/cola-66.log" | tail -n 2
echo "In the released layout ($run/released-66/hf):"
grep "^The prior knows" "$run/released-66.log" | tail -n 2
echo "Written by $run/cola-66:"
cola-train sample "$run/cola-66" --prompt "It was" --prompt "She could not" --prompt "My dear" max_new_tokens=48 seed=1 \
    noise_scale=0.8 guidance_scale=1.5
echo "Written in the released layout by $run/released-66:"
cola-train sample "$run/released-66" --prompt "It was" --prompt "She could not" --prompt "My dear" max_new_tokens=48 seed=1 \
    noise_scale=0.5 guidance_scale=2 history=reencoded
cat <<TEXT
A picture of the VAE and the prior: $run/cola-66/inspection/inspection.png
What to try next:
  cola-train sample $run/cola-66 --prompt "Your words" noise_scale=1 guidance_scale=1   # as the model has learned it
  cola-train compare $run/cola-66 --against $run/ar-66   # any two models by the same judge
  cola-train prepare out=data/mine tokenizer=data/austen-4096.json 'corpus.inputs=[my_texts]' seq_len=64   # text of your own
What each setting of the prior is worth: docs/recipe.md, configs/small/study_recipe.yaml
TEXT
