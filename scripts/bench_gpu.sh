#!/usr/bin/env bash
# What is to be measured where there is a GPU (docs/benchmarks.md): training steps and sampling at the paper's size, then a model
# trained through both stages on text of yours, with its curves, a look into its latents, and continuations. Everything goes into a new
# folder.
#   bash scripts/bench_gpu.sh 'texts/*.txt' bench-gpu      paths are from the repository's folder
# Settings are environment variables [default]:
#   ACCELERATOR, DEVICE            gpu and cuda; cpu and cpu tries the script out [gpu, cuda]
#   TRAINED                        workloads of `bench train`, each at its fastest micro-batch [paper_stage2 paper_stage1]
#   TRAIN_SETTINGS                 more settings of it ["trainer.compile=true"]
#   SAMPLED, BATCHES               workload and batches of `bench sample` [paper; 1 64]
#   SAMPLE_SETTINGS                more settings of it [""]
#   VAE_MINUTES, JOINT_MINUTES     of training [10, 50]; at most so much, but for start, validation and checkpoints
#   VOCAB_SIZE, SEQ_LEN            of the tokenizer and the rows [16384, 512]
#   VAE_SETTINGS, JOINT_SETTINGS   more settings of the runs, over configs/small/bench_vae.yaml and configs/small/bench_joint.yaml
#                                  ["trainer.compile=true" each]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PATH="$PATH:$PWD/.venv/bin"
texts="${1:?the texts to train on, as for prepare: files or patterns}"
out="${2:?a new folder for the results}"
mkdir "$out"

on="trainer.accelerator=${ACCELERATOR:-gpu}"
TRAIN_SETTINGS="${TRAIN_SETTINGS-trainer.compile=true}"
VAE_SETTINGS="${VAE_SETTINGS-trainer.compile=true} vae.vocab_size=${VOCAB_SIZE:-16384} data.path=$out/rows $on"
JOINT_SETTINGS="${JOINT_SETTINGS-trainer.compile=true} vae.vocab_size=${VOCAB_SIZE:-16384} data.path=$out/rows $on"

# Settings are words, to be split.
# shellcheck disable=SC2086
{
for workload in ${TRAINED:-paper_stage2 paper_stage1}; do
    cola-train bench train "workload=$workload" rows=1 find_rows=true profile=true $TRAIN_SETTINGS "$on" \
        "out=$out/train-$(basename "$workload" .yaml).json"
done
for batch in ${BATCHES:-1 64}; do
    cola-train bench sample "workload=${SAMPLED:-paper}" "batch=$batch" ${SAMPLE_SETTINGS:-} --device "${DEVICE:-cuda}" \
        "out=$out/sample-$batch.json"
done

cola-train tokenizer train "out=$out/tokenizer.json" "corpus.inputs=[$texts]" "vocab_size=${VOCAB_SIZE:-16384}"
cola-train prepare "out=$out/rows" "tokenizer=$out/tokenizer.json" "corpus.inputs=[$texts]" "seq_len=${SEQ_LEN:-512}" \
    held_out_share=0.01

# Steps of a run that fit into some minutes, by the measured time of one.
steps() {
    cola-train bench train "workload=configs/small/bench_$1.yaml" "seq_len=${SEQ_LEN:-512}" $2 "out=$out/step-$1.json"
    python3 -c "import json; print(max(3, int($3 * 60 / json.load(open('$out/step-$1.json'))['seconds']['median'])))"
}
size="data.seq_len=${SEQ_LEN:-512} runs_folder=$out"
n="$(steps vae "$VAE_SETTINGS" "${VAE_MINUTES:-10}")"
cola-train vae configs/small/bench_vae.yaml name=vae $size $VAE_SETTINGS "trainer.max_steps=$n" "optim.decay=$n"
n="$(steps joint "$JOINT_SETTINGS" "${JOINT_MINUTES:-50}")"
cola-train joint configs/small/bench_joint.yaml name=joint "init_vae_from=$out/vae" $size $JOINT_SETTINGS "trainer.max_steps=$n" \
    "optim.decay=$n"
}
cola-train inspect "$out/joint" --data "$out/rows" --reference "$out/vae" --device "${DEVICE:-cuda}"
cola-train sample "$out/joint" --prompt "" --prompt "The" --prompt "It was" max_new_tokens=128 --device "${DEVICE:-cuda}" \
    --out "$out/samples.jsonl"
