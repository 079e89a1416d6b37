"""`mpifedlora` that sleeps before a client is trained, in the first start of a job: time to disturb it."""

import os
import sys
import time

from mpifedlora.cli.main import entry


def slow_down(seconds: float) -> None:
    from mpifedlora.runtime import worker

    train_client = worker.train_client

    def paced(*arguments, **options):
        time.sleep(seconds)
        return train_client(*arguments, **options)

    worker.train_client = paced


if __name__ == "__main__":
    if "SLURM_RESTART_COUNT" not in os.environ and sys.argv[1] == "run":
        slow_down(float(os.environ["PACE_S"]))
    entry()
