#!/usr/bin/env bash
# The tests that need real MPI: one mpirun, communicators of 1, 2, 3 and 5 processes.
# Arguments go to pytest, for example: tests/run_mpi.sh -k gather
# A hang fails: each test may take 120 s, all of them MPI_TESTS_LIMIT_S (default 900).
set -euo pipefail
cd "$(dirname "$0")/.."
. tests/mpi_env.sh

export HF_HUB_OFFLINE=1
export OMP_NUM_THREADS=1 # five processes share the cores
limit_s=${MPI_TESTS_LIMIT_S:-900}
color=no # asked here: mpirun gives MPI rank 0 a terminal even where there is none
if [ -t 1 ]; then color=yes; fi

SECONDS=0
status=0
timeout --kill-after=10 "$limit_s" mpirun -n 5 \
    python -m pytest -q --color=$color -p no:cacheprovider --timeout=120 tests/transport/mpi "$@" \
    </dev/null || status=$?
if [ "$status" -ne 0 ] && [ "$SECONDS" -ge "$limit_s" ]; then
    echo "run_mpi.sh: the tests must end within $limit_s s, and did not: a process hangs" >&2
elif [ "$status" -ne 0 ]; then
    echo "run_mpi.sh: the tests over MPI failed (exit code $status)" >&2
fi
exit "$status"
