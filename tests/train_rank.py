"""One of several processes that train stages together: train_rank.py ROOT [JOB ...].

ROOT/jobs.pickle holds the stages by name (`training_jobs.Job`); all of them, or those named, are
trained one after the other in float32. What a job is to go wrong with is done here.
"""

from __future__ import annotations

import sys
from pathlib import Path

from pumice.core.processes import joined_processes
from training_jobs import read_jobs, run_job


def main(root: Path, names: list[str]) -> None:
    jobs = read_jobs(root)
    with joined_processes() as group:
        for name in names or jobs:
            run_job(jobs[name], root / f"ranks-{group.size}" / name, group)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
