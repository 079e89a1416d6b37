"""Folders with one file a client, and a federation on them whose processes note what they open."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

CLIENTS = ("ann", "bob", "cy", "dot")
FILES = ("ann.csv", "bob.jsonl", "cy.csv", "dot.jsonl")
ROOT = Path(__file__).parents[1]


def read_rows(file):
    """Return the rows of a CSV file, without its head."""
    with file.open(newline="") as stream:
        return list(csv.reader(stream))[1:]


def write_rows(file, head, rows):
    """Write a CSV file."""
    with file.open("w", newline="") as stream:
        csv.writer(stream).writerows([head, *rows])


def write_clients(folder, rows):
    """Write each client's rows to a file of its own; two of them CSV, the others JSONL."""
    folder.mkdir()
    for number, name in enumerate(FILES):
        own = rows[number :: len(FILES)]
        if number % 2:
            lines = [json.dumps({"text": text, "label": label}) for text, label in own]
            (folder / name).write_text("\n".join(lines))
        else:
            write_rows(folder / name, ("text", "label"), own)


WATCHED = """
import json, os, sys
from pathlib import Path
seen = set()
def hook(event, arguments):
    if event in ("open", "os.listdir", "os.scandir") and isinstance(arguments[0], (str, bytes, os.PathLike)):
        seen.add(os.fsdecode(arguments[0]))
sys.addaudithook(hook)
from mpifedlora.runtime import launch
clients, notes = Path(sys.argv[1]), Path(sys.argv[2])
code = launch.run(Path(sys.argv[3]), sys.argv[5:], Path(sys.argv[4]), False)
own = sorted(Path(path).name for path in seen if Path(path).parent == clients or Path(path) == clients)
(notes / os.environ["OMPI_COMM_WORLD_RANK"]).write_text(json.dumps(own))
sys.exit(code)
"""


def run_watched(run_file, clients, out, notes, settings):
    """Run a federation of a server and two workers, whatever a process opens or lists noted by Python itself.

    Returns:
        What each process has opened of the clients' files, by MPI rank; and standard output.
    """
    notes.mkdir()
    (notes / "watched.py").write_text(WATCHED)
    arguments = [notes / "watched.py", clients, notes, run_file, out, *settings]
    ended = subprocess.run(
        ["bash", "-c", f'. {ROOT}/tests/mpi_env.sh; exec mpirun -n 3 "$@"', "mpirun", sys.executable]
        + list(map(str, arguments)),
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        stdin=subprocess.DEVNULL,
    )
    assert ended.returncode == 0, ended.stderr
    return [json.loads((notes / str(mpi_rank)).read_text()) for mpi_rank in range(3)], ended.stdout
