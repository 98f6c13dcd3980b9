#!/usr/bin/env bash
# Ranks under MPI's launcher: scripts/mpiexec.sh [ranks] [script] [its arguments...]
#
# More options for mpiexec go into MPIEXEC_FLAGS: MPIEXEC_FLAGS="-ppn 12 -hosts a,b" scripts/mpiexec.sh 24 app.py
# `pip install "cocodiff[mpi]"` brings an mpiexec for one machine. On a cluster use the cluster's own, and an mpi4py
# that was built against it: a launcher of one MPI with the library of another makes every rank "0 of 1".
set -euo pipefail

ranks="${1:-4}"
script="${2:-$(dirname "${BASH_SOURCE[0]}")/../examples/flux.py}"
shift "$(($# < 2 ? $# : 2))"

# Ranks on CPUs would otherwise each take every core.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# shellcheck disable=SC2086 # several flags in one variable
exec mpiexec ${MPIEXEC_FLAGS:-} -n "$ranks" python "$script" "$@"
