"""A run that wants to be started again: in a job of Slurm it asks for that itself."""

import os
import subprocess
import sys

from sslctl.errors import first_line, say


def requeue() -> None:
    """Asks Slurm to start this job again, and says so; outside of a job it does nothing. For the first process alone."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return
    if "SLURM_ARRAY_JOB_ID" in os.environ and "SLURM_ARRAY_TASK_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        why = (getattr(error, "stderr", None) or first_line(error)).strip()
        say(f"sslctl: scontrol requeue {job} failed: {why}", file=sys.stderr)
    else:
        say(f"sslctl: scontrol requeue {job}: the job starts again and continues the run", file=sys.stderr)
