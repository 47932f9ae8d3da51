"""How a run stands, from its folder alone: nothing has to run, and nothing of a run that does is disturbed."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from dali_loaders.names import printable, quoted
from dali_loaders.progress import time_left
from dali_loaders.remote import is_remote, without_secrets
from pipeline import beats
from pipeline.checkpoint.folder import ABOUT, FOLDER, MOST_ABOUT, complete, places, step_of
from pipeline.checkpoint.stores import store_of
from pipeline.heartbeat import shown
from pipeline.lease import BEAT
from pipeline.lease_files import LARGEST, LOGS, NAME

TAIL = 1 << 18  # bytes of metrics.jsonl that are read
MOST_SHOWN = 16  # ranks in the table
ENDS = ("refused", "error", "stopped", "hung", "lost")  # of ranks (heartbeat.py): one that is named earlier is why others end


@dataclass
class Rank:
    rank: int
    host: str
    is_alive: bool
    step: int
    doing: str
    end: str = ""  # how it said it ends


@dataclass
class Status:
    """Figures are None where nothing tells them."""

    run: str
    state: str  # running, starting, finished, stopped, failed, waiting (its job runs, its ranks do not), or gone (ended without a word)
    why: str = ""  # a rank's own words about a failure
    step: int | None = None
    total_steps: int | None = None
    images_per_second: float | None = None
    loss: float | None = None
    seconds_left: float | None = None
    seconds_since_line: float | None = None  # of metrics, by this machine's clock
    checkpoint: str | None = None
    job: str | None = None
    logs: str | None = None
    ranks: list[Rank] = field(default_factory=list)


def of_run(path: str, wait: Callable[[float], None] = time.sleep, job_runs: bool = False) -> Status:
    """Takes some seconds, to see whether its ranks live. ValueError, one sentence, where `path` is no run's folder.

    job_runs: the cluster says that the run's job has not ended"""
    if is_remote(path):
        raise ValueError(f"{without_secrets(path)} is an address; give the run's folder (run.folder), which is local")
    if not os.path.isdir(path):
        fault = "is no folder" if os.path.lexists(path) else "does not exist"
        job = "" if os.sep in path or os.path.lexists(path) else "; for the job of that name or id give --address RAY_ADDRESS too"
        raise ValueError(f"{quoted(path)} {fault}; give the folder of a run{job}")
    signs = (ABOUT, "metrics.jsonl", FOLDER, beats.FOLDER)
    leases = [name for name in os.listdir(path) if NAME.fullmatch(name)]
    if not leases and not any(os.path.exists(os.path.join(path, sign)) for sign in signs):
        raise ValueError(f"{quoted(path)} is no run's folder: it has none of {', '.join(signs)}")
    alive = beats.alive(path, wait)
    status = Status(path, "gone", ranks=_ranks(path, alive))
    start = _json(Path(path, ABOUT)).get("start")
    start = start if isinstance(start, dict) else {}
    total = start.get("total_steps")
    status.total_steps = total if isinstance(total, int) else None
    _add_metrics(status, start)
    saved = _checkpoints(path)
    status.checkpoint = saved[-1] if saved else None
    done = max([step_of(os.path.basename(name)) for name in saved[-1:]] + [rank.step for rank in status.ranks] + [status.step or 0])
    status.step = done if done or status.step is not None or status.ranks else None
    status.job = _newest_job(path)
    status.logs = os.path.join(path, LOGS, status.job) if status.job else None
    status.state = _state(status, saved, leases, wait)
    if job_runs and status.state in ("stopped", "failed", "gone"):
        status.state = "waiting"
    if status.state in ("failed", "waiting"):
        status.why = _why(_first_end(status.ranks))
    if status.state not in ("running", "starting"):
        status.seconds_left = None
    return status


def as_json(status: Status) -> str:
    return json.dumps(asdict(status), indent=1)


def as_text(status: Status) -> str:
    said = {
        "running": "running",
        "starting": "starting: its ranks are not in step yet",
        "finished": "finished",
        "stopped": "stopped: the same command continues",
        "failed": "failed: the same command continues, once the reason is gone",
        "waiting": "waiting: its job runs, and its ranks do not; they start anew, or wait for hosts",
        "gone": "not running, and ended without a word: the same command continues from the newest checkpoint",
    }
    lines = [f"{printable(status.run)}: {said[status.state]}"]
    if status.why:
        lines.append(f"reason      {printable(status.why)}")
    if status.step is not None:
        of = f" of {status.total_steps:,} ({status.step / status.total_steps:.0%})" if status.total_steps else ""
        left = f", {time_left(status.seconds_left)}" if status.seconds_left is not None else ""
        lines.append(f"step        {status.step:,}{of}{left}")
    figures = [f"{status.images_per_second:,.0f} images/s"] if status.images_per_second is not None else []
    figures += [f"loss {status.loss:.4f}"] if status.loss is not None else []
    if figures:
        ago = f", {shown(max(0.0, status.seconds_since_line or 0.0))} ago"
        lines.append(f"last line   {', '.join(figures)}{ago}")
    lines.append(f"checkpoint  {printable(status.checkpoint or 'none yet')}")
    if status.job:
        lines.append(f"job         {printable(status.job)}, logs in {printable(str(status.logs))}")
    living = sum(rank.is_alive for rank in status.ranks)
    if status.ranks:
        lines.append(f"ranks       {living} of {len(status.ranks)} alive")
    first = sorted(status.ranks, key=lambda rank: (rank.is_alive, rank.rank))[:MOST_SHOWN]  # those that are not come first
    for rank in sorted(first, key=lambda rank: rank.rank):
        how = "" if rank.is_alive else f"{rank.end or 'silent'}: "
        lines.append(f"  {rank.rank:>4} on {printable(rank.host)}  {how}after step {rank.step:,} in {printable(rank.doing)}")
    if len(status.ranks) > MOST_SHOWN:
        lines.append(f"  ... and {len(status.ranks) - MOST_SHOWN} more (--json has all)")
    return "\n".join(lines)


def _ranks(path: str, alive: dict[int, bool]) -> list[Rank]:
    return [
        Rank(beat.rank, beat.host, alive.get(beat.rank, False), beat.step, beat.doing, beat.end)
        for beat in beats.of_one_start(beats.read_all(path))
        if beat.rank in alive
    ]


def _state(status: Status, saved: list[str], leases: list[str], wait: Callable[[float], None]) -> str:
    if any(rank.is_alive for rank in status.ranks):
        return "running" if max(rank.step for rank in status.ranks) >= 0 else "starting"
    if saved and status.total_steps is not None and step_of(os.path.basename(saved[-1])) >= status.total_steps:
        return "finished"
    if (first := _first_end(status.ranks)) is not None:
        return "stopped" if first.end == "stopped" else "failed"
    newest = max(leases, key=lambda name: int(NAME.fullmatch(name)[1]), default=None)  # type: ignore[index]
    if newest is None:
        return "stopped"
    before = _json(Path(status.run, newest))
    if before.get("released"):
        return "stopped"
    for _ in range(int(BEAT) + 2):  # it may still open its data, before its ranks beat
        wait(1.0)
        now = _json(Path(status.run, newest))
        if now.get("released"):
            return "stopped"
        if now.get("beat") != before.get("beat"):
            return "starting"
    return "gone"


def _first_end(ranks: list[Rank]) -> Rank | None:
    """Of the rank because of which the others ended."""
    return min((rank for rank in ranks if rank.end in ENDS), key=lambda rank: ENDS.index(rank.end), default=None)


def _why(rank: Rank | None) -> str:
    if rank is None or rank.end == "stopped":
        return ""
    if rank.end == "lost":
        return rank.doing  # which names the one that was lost
    when = f"after step {rank.step:,}" if rank.step >= 0 else "at the start"
    return f"rank {rank.rank} on {rank.host} {'stood still' if rank.end == 'hung' else 'failed'} {when}: {rank.doing}"


def _add_metrics(status: Status, start: dict[str, Any]) -> None:
    rows = [row for row in _last_rows(Path(status.run, "metrics.jsonl")) if isinstance(row.get("images_per_second"), float)]
    if not rows:
        return
    last = rows[-1]
    status.step, status.images_per_second, status.loss = last["step"], last["images_per_second"], last.get("loss")
    with suppress(KeyError, TypeError, ValueError, ZeroDivisionError):
        status.seconds_since_line = time.time() - last["time"]
        first = next((row for row in rows if _is_since(row, start)), last)
        pace = (last["time"] - first["time"]) / (last["step"] - first["step"])  # with evaluations and saves
        if status.total_steps is not None and pace > 0:
            status.seconds_left = pace * (status.total_steps - last["step"])


def _is_since(row: dict[str, Any], start: dict[str, Any]) -> bool:
    """Whether a line belongs to the newest start: the time for which a run stood still belongs to no pace."""
    return bool(row["step"] > start["step"] and row["time"] >= datetime.fromisoformat(start["when"]).timestamp())


def _last_rows(path: Path) -> list[dict[str, Any]]:
    """The last hundred at most."""
    rows: list[dict[str, Any]] = []
    with suppress(OSError), path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL))
        for line in file.read(TAIL).split(b"\n")[-101:]:
            with suppress(ValueError, RecursionError):
                row = json.loads(line)
                if isinstance(row, dict) and isinstance(row.get("step"), int):
                    rows.append(row)
    return rows


def _checkpoints(path: str) -> list[str]:
    for folder in places(path):
        with suppress(OSError, ValueError):
            store = store_of(folder)
            if names := complete(store):
                return [f"{without_secrets(store.path)}/{name}" for name in names]
    return []


def _newest_job(path: str) -> str | None:
    with suppress(OSError), os.scandir(os.path.join(path, LOGS)) as entries:
        jobs = [(entry.stat().st_mtime, entry.name) for entry in entries if entry.is_dir(follow_symlinks=False)]
        return max(jobs)[1] if jobs else None
    return None


def _json(path: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError, RecursionError), path.open("rb") as file:
        values = json.loads(file.read(max(MOST_ABOUT, LARGEST)))
        return values if isinstance(values, dict) else {}
    return {}
