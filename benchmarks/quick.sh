#!/usr/bin/env bash
# The quick form of every benchmark, then the comparison with the committed results: benchmarks/quick.sh FOLDER
# Ends with 1 if a bound is broken or a benchmark fails; what is only worse than committed is a warning.
set -uo pipefail
cd "$(dirname "$0")/.."
. tests/mpi_env.sh
folder=$(realpath -m "${1:-runs/bench}")
mkdir -p "$folder"
rm -f "$folder"/bench_*.json

failed=()
quick() { # SCRIPT PROCESSES, or 1 where the script is no MPI job
    echo "== $1"
    local arguments=("$1.py" "$2" --quick --json "$folder/$1.json")
    if [ "$2" -gt 1 ]; then
        benchmarks/run.sh "${arguments[@]}" || failed+=("$1")
    else
        python "benchmarks/$1.py" "${arguments[@]:2}" || failed+=("$1")
    fi
}

quick bench_codec 1
quick bench_aggregation 1
quick bench_transport 4
quick bench_round 5
quick bench_memory 3
quick bench_waiting 5
quick bench_scaling 5
quick bench_local 1
quick bench_startup 1

echo "== against the committed results"
python benchmarks/check.py "$folder"/bench_*.json || failed+=(check)
if [ ${#failed[@]} -gt 0 ]; then
    echo "quick.sh: broken or failed: ${failed[*]}" >&2
    exit 1
fi
