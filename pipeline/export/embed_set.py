"""`protoshard embed`: embeddings of a set of any size to a file, over all ranks. One that is broken off goes on where it stopped.

The set is cut into chunks whatever the number of ranks; each is a file of its own until all are there and become OUT."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import torch

from dali_loaders.config import DataConfig
from dali_loaders.extras import MissingPackageError
from dali_loaders.graphs import dali_modules
from dali_loaders.names import printable
from dali_loaders.progress import progress
from dali_loaders.skipped import Skipped
from dali_loaders.sources import Source
from pipeline.agreement import Agreement
from pipeline.distributed import join
from pipeline.export import embedding_files
from pipeline.export.embedding_files import Rows
from pipeline.export.images import open_images
from pipeline.export.loading import Model
from pipeline.export.model_folder import open_model
from pipeline.export.new_folder import check_new, sync
from pipeline.same_data import open_on_all_ranks

PARTIAL, JOB = ".partial", "job.json"
CHUNK = 4096  # images, about; a whole number of batches, so that batches are the same whatever is done anew


class Result(NamedTuple):
    rows: int
    width: int
    unreadable: int
    decoder: str  # "DALI" or "OpenCV"


class _Listed(Skipped):
    """Also which image has which reason."""

    def __init__(self, source: Source) -> None:
        super().__init__(source, None)
        self.listed: list[tuple[int, str]] = []

    def add(self, index: int, reason: str) -> None:
        if index not in self:
            self.listed.append((index, reason))
        super().add(index, reason)


def embed_set(
    model_path: str,
    images: str,
    out: str,
    *,
    ema: bool = False,
    recipe: str | None = None,
    flip: bool | None = None,
    decoder: str = "auto",
    chunk: int = CHUNK,
) -> Result:
    """Every rank calls it; rank 0 writes OUT (.parquet or .npy), and OUT.unreadable.txt if there are any such images.

    flip: as in the model's description unless given
    decoder: "dali", "opencv", or "auto" for DALI where it is installed
    Until OUT is there, OUT.partial holds what is done; the same command goes on from it. ValueError where OUT exists, where OUT.partial is
    of another job or in use, and for an embedding that is not finite."""
    embedding_files.check(out)
    folder, lock, fault = out + PARTIAL, None, None
    check_new(out)
    if not os.path.isdir(folder):  # else they may be of this job, broken off between two renames
        for path in [*embedding_files.beside(out), _unreadable(out)]:
            check_new(path)
    place = join()
    agreement = Agreement()
    model = open_model(model_path, ema=ema, recipe=recipe, device=place.device)
    about = model.description
    data = DataConfig(image_size=about.image_size)
    source, fingerprint = open_on_all_ranks(images, lambda: open_images(images, data))
    uses_dali = _uses_dali(decoder)
    flip = about.flip if flip is None else flip
    chunk = max(1, chunk // about.batch_size) * about.batch_size
    job = {"model": about.weights, "flip": flip, "decoder": "dali" if uses_dali else "opencv", "chunk": chunk, "set": fingerprint}
    try:
        if place.is_first:
            lock, fault = _begin(folder, job)
        fault = agreement.of_first(fault)
        if fault:
            raise ValueError(fault)
        chunks = range(-(-len(source) // chunk))
        todo = agreement.of_first([number for number in chunks if _read(folder, number) is None] if place.is_first else [])
        mine = todo[place.rank :: place.world_size]
        with progress("embedding", sum(min(chunk, len(source) - number * chunk) for number in mine)) as done:
            for number in mine:
                indices = np.arange(number * chunk, min((number + 1) * chunk, len(source)))
                _write(folder, number, *_embed(model, source, data, indices, flip, uses_dali))
                done.add(len(indices))
        agreement.gather(None)
        result = None
        if place.is_first:
            result = _finish(folder, out, source, list(chunks), job, "DALI" if uses_dali else "OpenCV")
        result = agreement.of_first(result)
        assert result is not None
        return result
    except OSError as error:
        raise ValueError(f"{printable(folder)} cannot be written ({error.strerror or error}): the same command goes on from it") from error
    finally:
        if lock is not None:
            os.close(lock)


def _uses_dali(decoder: str) -> bool:
    if decoder == "opencv":
        return False
    try:
        dali_modules()
    except (MissingPackageError, ValueError):
        if decoder == "dali":
            raise
        return False
    return True


def _begin(folder: str, job: dict[str, Any]) -> tuple[int | None, str | None]:
    """(descriptor that holds the folder, what is wrong)."""
    path, text = os.path.join(folder, JOB), json.dumps(job)
    try:
        os.makedirs(folder, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        return None, f"{printable(folder)} cannot be written: {error.strerror or error}"
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            os.close(descriptor)
            return None, f"{printable(folder)} is being written by another command: wait for it, or choose another name"
    said = os.read(descriptor, 1 << 20)
    if not said:
        os.write(descriptor, text.encode())
    elif said != text.encode():
        os.close(descriptor)
        return None, (
            f"{printable(folder)} holds a part of other embeddings (another model, set or option): remove it, or choose another name"
        )
    return descriptor, None


def _embed(
    model: Model, source: Source, data: DataConfig, indices: np.ndarray, flip: bool, uses_dali: bool
) -> tuple[np.ndarray, np.ndarray, list[tuple[int, str]]]:
    """Embeddings float32 [n, D], the numbers of their images int64 [n], and what is unreadable."""
    skipped = _Listed(source)
    size, device = model.description.batch_size, next(model.network.parameters()).device
    parts, found = [np.zeros((0, model.description.backbone.width), np.float32)], [np.zeros(0, np.int64)]
    for batch in _batches(source, data, indices, size, device, skipped, uses_dali):
        embedding_bD = model.embedded(batch.images.to(device), flip)
        bad = (~torch.isfinite(embedding_bD).all(dim=1)).nonzero().flatten().tolist()
        if bad:
            raise ValueError(f"{model.path} gives an embedding that is not finite for {source.name(int(batch.indices[bad[0]]))}")
        parts.append(embedding_bD.cpu().numpy())
        found.append(np.asarray(batch.indices, np.int64))
    return np.concatenate(parts), np.concatenate(found), skipped.listed


def _batches(
    source: Source, data: DataConfig, indices: np.ndarray, size: int, device: torch.device, skipped: Skipped, uses_dali: bool
) -> Iterator[Any]:
    if uses_dali:
        from dali_loaders.loader import evaluation_batches

        return evaluation_batches(source, data, indices, size, device, channels_last=True, skipped=skipped)
    from pipeline.export import decoding

    return decoding.batches(source, data, indices, size, skipped)


def _chunk_file(folder: str, number: int) -> str:
    return os.path.join(folder, f"chunk-{number:06d}.npz")


def _write(folder: str, number: int, embedding_nD: np.ndarray, index_n: np.ndarray, unreadable: list[tuple[int, str]]) -> None:
    path = _chunk_file(folder, number)
    reasons = np.frombuffer(json.dumps(unreadable).encode(), np.uint8)
    with open(f"{path}.tmp", "wb") as file:
        np.savez(file, embedding=embedding_nD, index=index_n, unreadable=reasons)
        file.flush()
        os.fsync(file.fileno())
    os.replace(f"{path}.tmp", path)


def _read(folder: str, number: int) -> tuple[np.ndarray, np.ndarray, list[tuple[int, str]]] | None:
    """What `_write` wrote; None where that is missing or damaged (a zip archive has checksums), and is to be done."""
    try:
        with np.load(_chunk_file(folder, number), allow_pickle=False) as file:
            return file["embedding"], file["index"], json.loads(file["unreadable"].tobytes())
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, EOFError):
        return None


def _finish(folder: str, out: str, source: Source, chunks: list[int], job: dict[str, Any], decoder: str) -> Result:
    count, width, unreadable = 0, 0, list[tuple[int, str]]()
    for number in chunks:
        embedding_nD, _, bad = _chunk(folder, number)
        count, width, unreadable = count + len(embedding_nD), embedding_nD.shape[1], unreadable + bad
    lines = "".join(f"{printable(source.name(index))}\t{printable(reason)}\n" for index, reason in unreadable)
    if not count:
        raise ValueError(f"{source.path}: none of its {len(source)} images can be decoded, such as {lines.splitlines()[0]!r}")
    files = embedding_files.beside(out)
    inside = [os.path.join(folder, os.path.basename(file)) for file in files]
    if unreadable:
        files, inside = [_unreadable(out), *files], [os.path.join(folder, "unreadable.txt"), *inside]
    for file in inside:
        with suppress(FileNotFoundError):
            os.remove(file)  # of one that was broken off here
    if unreadable:
        with open(inside[0], "x", encoding="utf-8") as listing:
            listing.write(lines)
    ours = inside[1:] if unreadable else inside
    embedding_files.write(ours, (_rows(folder, number, source) for number in chunks), count, width, {**job, "rows": count})
    for file, path in zip(inside, files, strict=True):  # OUT is the last
        sync(file)
        if path == out:
            check_new(path)
        os.rename(file, path)
    sync(os.path.dirname(os.path.abspath(out)))
    shutil.rmtree(folder, ignore_errors=True)
    return Result(count, width, len(unreadable), decoder)


def _rows(folder: str, number: int, source: Source) -> Rows:
    embedding_nD, index_n, _ = _chunk(folder, number)
    return Rows(embedding_nD, [source.name(i) for i in index_n.tolist()], [source.identities[source.labels[i]] for i in index_n.tolist()])


def _chunk(folder: str, number: int) -> tuple[np.ndarray, np.ndarray, list[tuple[int, str]]]:
    found = _read(folder, number)
    if found is None:
        raise ValueError(f"{_chunk_file(folder, number)} has gone or is damaged: give the same command again")
    return found


def _unreadable(out: str) -> str:
    return f"{out}.unreadable.txt"
