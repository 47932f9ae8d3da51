"""`--check`: looks at all hosts before a run, prints one table, and says one sentence for each cell that fails. launch/look.py looks."""

import secrets
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from launch.versions import PACKAGES

ANSWER_SECONDS = 60
LEAST_FREE = {"/tmp": 1 << 30, "/dev/shm": 200 << 20}  # bytes: Ray's logs and sockets; its object store of 100 MB, and buffers of NCCL
LEAST_FREE_RUN = 2 << 30  # of the run's folder, for checkpoints
CLOCK_SECONDS = 2.0
GPU_FREE = 0.9  # of a GPU's memory; else another program is there


class Place(Protocol):
    """A host that is asked: launch/check_hosts.py over ssh, launch/check_cluster.py through Ray."""

    name: str
    address: str
    slots: int | None

    def send(self, what: str, **arguments: Any) -> None: ...

    def answer(self, deadline: float) -> Any:
        """Of what was sent. ValueError: why there is none."""


@dataclass
class Row:
    """A host of the table."""

    name: str
    cells: dict[str, str] = field(default_factory=dict)
    faults: dict[str, str] = field(default_factory=dict)  # by column: what is wrong, and what to do

    def fails(self, column: str, cell: str, sentence: str) -> None:
        self.cells[column] = f"!{cell}"
        self.faults[column] = sentence


class LostError(Exception):
    """A host stopped answering in the middle; its row says why."""


class Check:
    """Columns appear in the order in which they are filled."""

    def __init__(self, places: Sequence[Place], unreachable: Sequence[tuple[str, str]] = ()) -> None:
        self.rows = [Row(place.name) for place in places]
        self.asked = list(zip(places, self.rows, strict=True))  # those that still answer
        self.lost = []
        for name, reason in unreachable:
            self.lost.append(Row(name))
            self.lost[-1].fails("host", "no", reason)

    def ask(self, what: str, each: Sequence[dict[str, Any]] | None = None, **same: Any) -> list[Any]:
        """Answers of the hosts, all asked at once. LostError: one does not answer."""
        for (place, _), own in zip(self.asked, each or [{}] * len(self.asked), strict=True):
            place.send(what, **same, **own)
        deadline, found = time.monotonic() + ANSWER_SECONDS, []
        for place, row in self.asked:
            try:
                found.append(place.answer(deadline))
            except ValueError as error:
                row.fails("host", "no", str(error))
        if len(found) < len(self.asked):
            raise LostError
        return found

    def look(self, recipe: str, overrides: Sequence[str]) -> None:
        with suppress(LostError):
            self._look(recipe, overrides)

    def _look(self, recipe: str, overrides: Sequence[str]) -> None:
        facts = self.ask("facts", recipe=recipe, overrides=list(overrides))
        for (place, row), fact in zip(self.asked, facts, strict=True):
            row.cells["host"] = fact["name"]
            alone(row, fact, place.slots)
        same_everywhere([row for _, row in self.asked], facts, any(place.slots is not None for place, _ in self.asked))
        folders = {fact["run_folder"] for fact in facts if fact["run_folder"]}
        if folders:
            self.shared(sorted(folders)[0])
        self.clocks()
        if len(self.asked) > 1 and self.network():
            self.together(all(fact["gpus"] for fact in facts) and facts[0]["device"] != "cpu")

    def shared(self, folder: str) -> None:
        """A file of each host in the run's folder is read on all others, and removed."""
        tokens = [secrets.token_hex(8) for _ in self.asked]
        refused = self.ask("write", [{"token": token} for token in tokens], run_folder=folder)
        seen = self.ask("read", run_folder=folder, tokens=tokens)
        apart = on_their_own(seen)
        for index, ((_, row), reason) in enumerate(zip(self.asked, refused, strict=True)):
            row.cells["run folder"] = "shared"
            if reason:
                row.fails(
                    "run folder", "no", f"{folder} cannot be written there ({reason}); give a run.folder that all hosts may write to."
                )
            elif index in apart and not any(refused):
                row.fails("run folder", "own", f"it does not see what others write into {folder}; give a run.folder that all hosts share.")
        for _ in range(len(Path(folder).parts)):  # a host's folders may hold another's
            if not any(self.ask("remove")):
                break

    def clocks(self) -> None:
        """Against each other, one host after the other: half of a round trip is the error."""
        offsets = []
        for place, row in self.asked:
            began = time.time()
            there = self.ask_one(place, row, "clock")
            offsets.append(there - (began + time.time()) / 2)
        usual = sorted(offsets)[(len(offsets) - 1) // 2]
        for (_, row), offset in zip(self.asked, offsets, strict=True):
            row.cells["clock"] = f"{offset - usual:+.2f} s"
            if abs(offset - usual) > CLOCK_SECONDS:
                row.fails("clock", f"{offset - usual:+.0f} s", f"its clock is {offset - usual:+.0f} s off the others'; start NTP there.")

    def network(self) -> bool:
        """Whether every host reaches every other; and how fast each sends to the next one, all at once."""
        ports = self.ask("serve", [{"address": place.address} for place, _ in self.asked])
        ends = [(place.address, port) for (place, _), port in zip(self.asked, ports, strict=True)]
        reached = self.ask("reach", others=ends)
        for (_, row), reasons in zip(self.asked, reached, strict=True):
            row.cells["ports"] = "open"
            for ((_, other), (address, port)), reason in zip(zip(self.asked, ends, strict=True), reasons, strict=True):
                if reason and "ports" not in row.faults:
                    sentence = f"{other.name} is not reached at {address}, port {port} ({reason}); open all TCP ports between the hosts."
                    row.fails("ports", "closed", sentence)
        if any(reason for reasons in reached for reason in reasons):
            return False
        rates = self.ask("send", [{"address": address, "port": port} for address, port in (*ends[1:], ends[0])])
        for (_, row), rate in zip(self.asked, rates, strict=True):
            row.cells["to the next"] = f"{rate / 1e9:.2f} Gbit/s"
        return True

    def together(self, nccl: bool) -> None:
        """One all-reduce through torch, as in training."""
        (first, row), ranks = self.asked[0], len(self.asked)
        port = self.ask_one(first, row, "free_port", address=first.address)
        each = [{"rank": rank, "address": place.address} for rank, (place, _) in enumerate(self.asked)]
        answers = self.ask("reduce", each, ranks=ranks, meeting=first.address, port=port, nccl=nccl)
        for (_, row), (rate, reason) in zip(self.asked, answers, strict=True):
            row.cells["all-reduce"] = f"{8 * rate / 1e9:.2f} Gbit/s"
            if reason:
                card = "NCCL_SOCKET_IFNAME" if nccl else "GLOO_SOCKET_IFNAME"
                row.fails("all-reduce", "no", f"no group with the other hosts ({reason}); name the network card in {card}.")

    def ask_one(self, place: Place, row: Row, what: str, **arguments: Any) -> Any:
        place.send(what, **arguments)
        try:
            return place.answer(time.monotonic() + ANSWER_SECONDS)
        except ValueError as error:
            row.fails("host", "no", str(error))
            raise LostError from None

    def report(self) -> int:
        """Prints the table and the sentences. The number of cells that fail."""
        rows = [*self.rows, *self.lost]
        columns = list(dict.fromkeys(column for row in rows for column in row.cells))
        lines = [["", *columns]] + [[row.name, *(row.cells.get(column, "") for column in columns)] for row in rows]
        widths = [max(len(line[index]) for line in lines) for index in range(len(columns) + 1)]
        for line in lines:
            print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
        faults = [(row.name, column, sentence) for row in rows for column, sentence in row.faults.items()]
        sys.stdout.flush()
        for name, column, sentence in faults:
            print(f"{name}, {column}: {sentence}", file=sys.stderr, flush=True)
        return len(faults)


def on_their_own(seen: Sequence[Sequence[bool]]) -> set[int]:
    """Which hosts do not share a folder with most others, of who sees what of whom; of two that do not, the second."""
    hosts = range(len(seen))
    partners = [sum(seen[one][other] and seen[other][one] for other in hosts if other != one) for one in hosts]
    return {one for one in hosts if 2 * partners[one] < len(seen) - 1 and (one or max(partners) > 0)}


def alone(row: Row, fact: dict[str, Any], slots: int | None) -> None:
    """What one host's facts say without the others'."""
    if fact["missing"]:
        row.fails("folder", "no", f"there is no folder {fact['missing']}; make it, or give --remote-dir.")
    if fact["refused"]:
        row.fails("configuration", "refused", fact["refused"])
    for place, count in fact["free"].items():
        least, column = LEAST_FREE.get(place, LEAST_FREE_RUN), place if place in LEAST_FREE else "disk"
        row.cells[column] = f"{count / 2**30:.1f} G"
        if count < least:
            row.fails(column, row.cells[column], f"{place} has {count / 2**20:.0f} MB free; make room for {least / 2**20:.0f} MB at least.")
    busy = [gpu for gpu in fact["gpus"] if gpu["free"] < GPU_FREE * gpu["total"]]
    if fact["gpus"]:
        row.cells["GPU free"] = f"{min(gpu['free'] for gpu in fact['gpus']) / 1024:.0f} G"
    if busy:
        least_free = min(gpu["free"] for gpu in busy)
        row.fails(
            "GPU free", row.cells["GPU free"], f"another program is on {len(busy)} of its GPUs ({least_free} MB free); end it (nvidia-smi)."
        )
    if slots is not None and slots > len(fact["gpus"]) > 0 and fact["device"] != "cpu":
        row.fails("GPUs", str(len(fact["gpus"])), f"{slots} ranks need {slots} GPUs, but it has {len(fact['gpus'])}; lower slots=N.")
    if fact["device"] == "cuda" and not fact["gpus"]:
        row.fails("GPUs", "none", "engine.device is cuda, but nvidia-smi shows no GPU; look at its driver, or set engine.device=cpu.")
    absent = [name for name, size in fact["data"].items() if size < 0]
    row.cells["data"] = "seen"
    if absent:
        row.fails("data", "no", f"there is no {absent[0]}; copy it there, or give a path that all hosts share.")


def same_everywhere(rows: Sequence[Row], facts: Sequence[dict[str, Any]], slots: bool) -> None:
    """What must be alike: most hosts have what is right, and the first one of two. With slots=N the numbers of GPUs may differ."""
    pinned = "; install the pinned versions (launch/quickstart.sh)."
    compared: dict[str, tuple[list[str], str]] = {
        "commit": (
            [fact["software"]["commit"] or fact["software"]["source"] for fact in facts],
            "; bring the checkouts to the same state.",
        ),
        "configuration": ([fact["configuration"] for fact in facts], "; the recipe or its files differ, bring them to the same state."),
        **{name: ([fact["software"][name] for fact in facts], pinned) for name in ("python", *PACKAGES)},
        "GPUs": ([str(len(fact["gpus"])) for fact in facts], "; give slots=N in the hosts file, or look at nvidia-smi there."),
        "driver": (["/".join(sorted({gpu["driver"] for gpu in fact["gpus"]})) for fact in facts], "; install the same driver."),
    }
    for column, (values, advice) in compared.items():
        usual = Counter(values).most_common(1)[0][0]
        for row, value in zip(rows, values, strict=True):
            if column in row.faults or (column == "GPUs" and slots):
                row.cells.setdefault(column, value)
                continue
            if any(values) and column != "configuration":
                row.cells[column] = value or "none"
            if value != usual and not (column == "configuration" and not value):
                other = rows[values.index(usual)].name
                row.fails(column, value or "none", f"{value or 'none'}, but {other} has {usual or 'none'}{advice}")
    sources = [fact["software"]["source"] for fact in facts]
    for row, source in zip(rows, sources, strict=True):
        if "commit" not in row.faults and source != Counter(sources).most_common(1)[0][0]:
            row.fails(
                "commit",
                row.cells["commit"],
                "its files differ from the others' at the same commit; bring the checkouts to the same state.",
            )
    for row, fact in zip(rows, facts, strict=True):
        for name, size in fact["data"].items():
            sizes = [other["data"].get(name, -1) for other in facts]
            usual_size = Counter(found for found in sizes if found >= 0).most_common(1)
            if usual_size and size >= 0 and size != usual_size[0][0] and "data" not in row.faults:
                row.fails("data", "differs", f"{name} has {size} bytes, but {usual_size[0][0]} on most hosts; copy it there again.")
