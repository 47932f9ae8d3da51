"""What `protoshard status JOB --address ...` asks the cluster."""

import os
import sys

from launch.options import needs_ray


def run_folder(job: str, address: str) -> tuple[str, bool]:
    """Of a job, and whether that has not ended; says how Ray sees it. ValueError where there is no such job, no cluster, or no Ray here."""
    needs_ray()
    from launch.attached import find, shown_name
    from launch.connecting import connect

    details = find(connect(address), job)
    print(f"job {shown_name(details)}: {details.status}", file=sys.stderr, flush=True)
    about = details.metadata or {}
    return os.path.join(about["folder"], os.path.dirname(about["stop_file"])), not details.status.is_terminal()
