"""What one worker of launch/embed.py does: whole parts of a set, each into a Parquet file of its own. Ray must import it by name."""

from __future__ import annotations

import json
import os
import socket
import zlib
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np

from dali_loaders.config import DataConfig
from dali_loaders.names import printable
from dali_loaders.sources import Source
from pipeline.export import embedding_files
from pipeline.export.embed_images import Part, Stretched, embed_images
from pipeline.export.embedding_files import Rows
from pipeline.export.new_folder import sync


class Task(NamedTuple):
    """What all workers of a job have in common."""

    model: str
    images: str
    out: str
    job: dict[str, Any]  # model, set and settings, as they stand in every file
    ema: bool
    recipe: str | None
    cpus: int  # of a worker


class Account(NamedTuple):
    """Of one file that is whole."""

    rows: int
    unreadable: list[tuple[int, str]]  # number in the set and reason
    stretched: Stretched


class Worker:
    """Opens model and set once, and then makes one file after another. What is wrong with its input it tells as a sentence in the answer:
    an exception would pass through Ray as a page of text."""

    def __init__(self, task: Task) -> None:
        self.task, self.fault = task, None
        # Its share of the cores of its machine, as a rank of training there.
        from pipeline.distributed import cores, join

        os.environ["LOCAL_WORLD_SIZE"] = str(max(1, cores() // task.cpus))
        os.environ["LOCAL_RANK"] = "0"
        try:
            place = join()
            from pipeline.export.images import open_images
            from pipeline.export.model_folder import open_model
            from pipeline.same_data import open_on_all_ranks

            self.model = open_model(task.model, ema=task.ema, recipe=task.recipe, device=place.device)
            data = DataConfig(image_size=self.model.description.image_size)
            self.source, found = open_on_all_ranks(task.images, lambda: open_images(task.images, data))
            for what, mine, theirs in (("model", self.model.description.weights, "model"), ("images", found, "set")):
                if mine != task.job[theirs]:
                    raise ValueError(f"{getattr(task, what)} on {socket.gethostname()} is another one than where the job was started")
        except ValueError as error:
            self.fault = str(error)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """{"part": number} to {"part", "images", "fault"}."""
        number, count = int(row["part"]), 0
        try:
            if self.fault is None:
                count = self._make(number)
        except ValueError as error:
            self.fault = str(error)
        except OSError as error:
            self.fault = f"{self.task.out} cannot be written on {socket.gethostname()} ({error.strerror or error})"
        return {"part": number, "images": count, "fault": self.fault or ""}

    def _make(self, number: int) -> int:
        job = self.task.job
        first = number * job["images_per_file"]
        indices = np.arange(first, min(first + job["images_per_file"], len(self.source)))
        part = embed_images(self.model, self.source, indices, job["flip"], job["decoder"] == "dali")
        write(self.task.out, number, job, part, self.source, self.model.description.backbone.width)
        return len(indices)


def name_of(number: int) -> str:
    return f"part-{number:06d}.parquet"


def write(out: str, number: int, job: dict[str, Any], part: Part, source: Source, width: int) -> None:
    """A file is there as a whole, or not at all. Two workers that write the same one write the same."""
    temporary = os.path.join(out, f".{name_of(number)}.{socket.gethostname()}-{os.getpid()}")
    index_n = part.index_n.tolist()
    names = [printable(source.name(i)) for i in index_n]
    identities = [printable(source.identities[source.labels[i]]) for i in index_n]
    rows = Rows(part.embedding_nD, names, identities)
    about = {
        **job,
        "part": number,
        "rows": len(index_n),
        "checksum": checksum(rows),
        "unreadable": part.unreadable,
        "stretched": part.stretched,
    }
    try:
        embedding_files.write([temporary], [rows], len(index_n), width, about)
        sync(temporary)
        os.rename(temporary, os.path.join(out, name_of(number)))
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    sync(out)


def checksum(rows: Rows) -> int:
    return zlib.crc32("\n".join([*rows.names, *rows.identities]).encode(), zlib.crc32(np.ascontiguousarray(rows.embedding_nD).data))


def account(out: str, number: int, job: dict[str, Any]) -> Account | None:
    """Of a file that `write` made for this job; None where it is missing or damaged."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = os.path.join(out, name_of(number))
    try:
        table = pq.read_table(path)
        about = json.loads(table.schema.metadata[b"protoshard"])
        embedding = table.column(embedding_files.COLUMN).combine_chunks().flatten().to_numpy(zero_copy_only=False)
        rows = Rows(embedding, table.column("name").to_pylist(), table.column("identity").to_pylist())
        is_whole = (about["rows"], about["part"], about["checksum"]) == (len(table), number, checksum(rows))
        if not is_whole or any(about[name] != value for name, value in job.items()):
            return None
        return Account(len(table), [(int(index), str(why)) for index, why in about["unreadable"]], Stretched(*about["stretched"]))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, pa.ArrowException):
        return None
