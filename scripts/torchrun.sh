#!/usr/bin/env bash
# Ranks on this machine with torch's own launcher: scripts/torchrun.sh [ranks] [script] [its arguments...]
#
# On several machines, run this on each, with the host of the first:
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=first-host scripts/torchrun.sh 8 app.py     (ranks: per machine)
set -euo pipefail

ranks="${1:-4}"
script="${2:-$(dirname "${BASH_SOURCE[0]}")/../examples/flux.py}"
shift "$(($# < 2 ? $# : 2))"

nodes="${NNODES:-1}"
if [ "$nodes" -gt 1 ]; then
    where=(--node-rank "${NODE_RANK:?the number of this machine, from 0}"
        --master-addr "${MASTER_ADDR:?the host of machine 0}" --master-port "${MASTER_PORT:-29500}")
else
    where=(--standalone) # picks a free port by itself
fi

# Ranks on CPUs would otherwise each take every core.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

exec python -m torch.distributed.run --nnodes "$nodes" --nproc-per-node "$ranks" "${where[@]}" "$script" "$@"
