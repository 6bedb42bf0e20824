#!/usr/bin/env bash
# Starts cola-train under torchrun on this machine, which is the only one or one of several that all run this command.
#   bash scripts/launch_torchrun.sh joint configs/paper/joint.yaml name=my-run
#   bash scripts/launch_torchrun.sh --dry-run joint ...   prints the command instead of running it
# Settings are environment variables [default]:
#   NNODES          number of machines [1]
#   NODE_RANK       this machine's number, from 0; the others meet at machine 0 [0]
#   NPROC_PER_NODE  processes on this machine [one a GPU; without GPUs 1]
#   MASTER_ADDR     machine 0, by a name or address that the others reach it by [127.0.0.1]
#   MASTER_PORT     a free port there [29500]
#   LOCAL_ADDR      this machine, by a name or address that the others reach it by [on machine 0 MASTER_ADDR, else its host name]
#   RDZV_ID         name of the launch, the same on all machines [cola_train]
#   LOG_DIR         every process' output is kept there, under node<NODE_RANK>/ [checkpoints/.logs/<date>]
#   MAX_RESTARTS    times torchrun starts all processes again after one has failed [0]
#   TORCH_ELASTIC_SHUTDOWN_TIMEOUT  seconds that processes have to save after a signal before they are killed [110]
#   OMP_NUM_THREADS, OMP_WAIT_POLICY  [1, PASSIVE]
set -euo pipefail
venv="$(dirname "${BASH_SOURCE[0]}")/../.venv/bin"
[ -d "$venv" ] && PATH="$(cd "$venv" && pwd):$PATH"

dry_run=
if [ "${1:-}" = "--dry-run" ]; then dry_run=yes && shift; fi
NNODES="${NNODES:-1}"
NODE_RANK="${NODE_RANK:-0}"
NPROC_PER_NODE="${NPROC_PER_NODE:-$(python3 -c 'import torch; print(torch.cuda.device_count() or 1)')}"
MASTER_ADDR="${MASTER_ADDR:-127.0.0.1}"
[ "$NODE_RANK" = 0 ] && LOCAL_ADDR="${LOCAL_ADDR:-$MASTER_ADDR}"

# Who hosts the meeting is said: torchrun's own guess fails where a host name resolves to a loopback address.
rendezvous=(
    --rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:${MASTER_PORT:-29500}" --rdzv-id "${RDZV_ID:-cola_train}"
    --rdzv-conf "is_host=$([ "$NODE_RANK" = 0 ] && echo true || echo false)"
)
[ "$NNODES" = 1 ] && rendezvous=(--standalone)
[ -n "${LOCAL_ADDR:-}" ] && rendezvous+=(--local-addr "$LOCAL_ADDR")

# c10d orders machines by address, so process 0 need not be on machine 0: each shows its own first process, by its global rank.
# shellcheck disable=SC2016  # torchrun fills in the rank
prefix='[${rank}] '
# By exec torchrun takes this process' place, and so gets the signals of SLURM, Kubernetes or a terminal itself.
command=(
    env "OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}" "OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}"
    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-110}" "TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE=$prefix"
    torchrun --nnodes "$NNODES" --nproc-per-node "$NPROC_PER_NODE" "${rendezvous[@]}" --max-restarts "${MAX_RESTARTS:-0}"
    --signals-to-handle "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"
    --log-dir "${LOG_DIR:-checkpoints/.logs/$(date +%Y%m%d-%H%M%S)}/node$NODE_RANK" --tee 3 --local-ranks-filter 0
    -m cola_train "$@"
)
if [ -n "$dry_run" ]; then
    printf '%q ' "${command[@]}" && echo
else
    exec "${command[@]}"
fi
