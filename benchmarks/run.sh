#!/usr/bin/env bash
# Start a benchmark over MPI: benchmarks/run.sh SCRIPT PROCESSES [ARGUMENTS of the script...]
#   benchmarks/run.sh bench_transport.py 4 --quick
#   MPIRUN_FLAGS="--with-ft ulfm" benchmarks/run.sh bench_round.py 5
# A hang fails: it may take BENCH_LIMIT_S seconds (default 900).
set -euo pipefail
if [ $# -lt 2 ]; then
    sed -n '2,5s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
cd "$(dirname "$0")/.."
. tests/mpi_env.sh

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # the processes share the cores
script=$1 processes=$2
shift 2
# shellcheck disable=SC2086 # flags are words
exec timeout --kill-after=10 "${BENCH_LIMIT_S:-900}" mpirun -n "$processes" ${MPIRUN_FLAGS:-} \
    python "benchmarks/$script" "$@" </dev/null
