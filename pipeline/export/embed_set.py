"""`protoshard embed`: embeddings of a set of any size to a file, over all ranks. One that is broken off goes on where it stopped.

The set is cut into chunks whatever the number of ranks; each is a file of its own until all are there and become OUT."""

from __future__ import annotations

import errno
import fcntl
import filecmp
import json
import os
import shutil
import zipfile
import zlib
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np

from dali_loaders.config import DataConfig
from dali_loaders.extras import MissingPackageError
from dali_loaders.graphs import dali_modules
from dali_loaders.names import printable
from dali_loaders.progress import progress
from dali_loaders.remote import is_remote, without_secrets
from dali_loaders.sources import Source
from pipeline.agreement import Agreement
from pipeline.distributed import join
from pipeline.export import embedding_files
from pipeline.export.embed_images import Part, Stretched, embed_images
from pipeline.export.embedding_files import Rows
from pipeline.export.images import open_images
from pipeline.export.model_folder import open_model
from pipeline.export.new_folder import check_new, refuse_remote, sync
from pipeline.same_data import open_on_all_ranks

PARTIAL, JOB = ".partial", "job.json"
CHUNK = 4096  # images, about; a whole number of batches, so that batches are the same whatever is done anew


class Result(NamedTuple):
    rows: int
    width: int
    unreadable: int
    decoder: str  # "DALI" or "OpenCV"
    remark: str | None  # on images that were stretched


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
    refuse_remote(out)
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
    uses_dali = uses_dali_for(decoder)
    flip = about.flip if flip is None else flip
    chunk = max(1, chunk // about.batch_size) * about.batch_size
    names = {"set": fingerprint, "place": place_of(images)}
    job = {"model": about.weights, "flip": flip, "decoder": "dali" if uses_dali else "opencv", "chunk": chunk, **names}
    try:
        if place.is_first:
            lock, fault = begin(folder, job)
        fault = agreement.of_first(fault)
        if fault:
            raise ValueError(fault)
        chunks = range(-(-len(source) // chunk))
        todo = agreement.of_first([number for number in chunks if _read(folder, number) is None] if place.is_first else [])
        mine = todo[place.rank :: place.world_size]
        images_here = sum(min(chunk, len(source) - number * chunk) for number in mine)
        with progress(f"embedding {os.path.basename(source.path)}", images_here) as done:
            for number in mine:
                indices = np.arange(number * chunk, min((number + 1) * chunk, len(source)))
                _write(folder, number, embed_images(model, source, indices, flip, uses_dali))
                done.add(len(indices))
        agreement.gather(None)
        result = None
        if place.is_first:
            result = _finish(folder, out, source, list(chunks), job)
        result = agreement.of_first(result)
        assert result is not None
        rows, width, unreadable, stretched = result
        remark = stretched.remark(without_secrets(images), rows, about)
        return Result(rows, width, unreadable, "DALI" if uses_dali else "OpenCV", remark)
    except OSError as error:
        raise ValueError(f"{printable(folder)} cannot be written ({error.strerror or error}): the same command goes on from it") from error
    finally:
        if lock is not None:
            os.close(lock)


def uses_dali_for(decoder: str) -> bool:
    """Whether DALI decodes. ValueError where it should and is not installed."""
    if decoder == "opencv":
        return False
    try:
        dali_modules()
    except (MissingPackageError, ValueError):
        if decoder == "dali":
            raise
        return False
    return True


def place_of(images: str) -> str:
    """What differs where a set of the same names lies elsewhere, or its file has another size or time."""
    places: list[Any] = []
    for path in images.split(","):
        if is_remote(path.strip()):
            places.append(path.strip())
            continue
        path = os.path.realpath(path.strip())
        status = os.stat(path) if os.path.isfile(path) else None
        places.append([path, *((status.st_size, status.st_mtime_ns) if status else ())])
    return f"{zlib.crc32(json.dumps(places).encode()):08x}"  # no path of this machine, since it comes into the files


def begin(folder: str, job: dict[str, Any], name: str = JOB) -> tuple[int | None, str | None]:
    """(descriptor that holds the folder, what is wrong). name: of the file in it that says what is made there"""
    path, text = os.path.join(folder, name), json.dumps(job)
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


def _chunk_file(folder: str, number: int) -> str:
    return os.path.join(folder, f"chunk-{number:06d}.npz")


def _write(folder: str, number: int, part: Part) -> None:
    path = _chunk_file(folder, number)
    account = np.frombuffer(json.dumps([part.unreadable, part.stretched]).encode(), np.uint8)
    with open(f"{path}.tmp", "wb") as file:
        np.savez(file, embedding=part.embedding_nD, index=part.index_n, account=account)
        file.flush()
        os.fsync(file.fileno())
    os.replace(f"{path}.tmp", path)


def _read(folder: str, number: int) -> Part | None:
    """What `_write` wrote; None where that is missing or damaged (a zip archive has checksums), and is to be done."""
    try:
        with np.load(_chunk_file(folder, number), allow_pickle=False) as file:
            unreadable, stretched = json.loads(file["account"].tobytes())
            return Part(file["embedding"], file["index"], unreadable, Stretched(*stretched))
    except (OSError, ValueError, TypeError, KeyError, zipfile.BadZipFile, EOFError):
        return None


def _finish(folder: str, out: str, source: Source, chunks: list[int], job: dict[str, Any]) -> tuple[int, int, int, Stretched]:
    """Joins the chunks. Rows, width, number of unreadable images, and those that were stretched."""
    count, width, unreadable, stretched = 0, 0, list[tuple[int, str]](), Stretched()
    for number in chunks:
        part = _chunk(folder, number)
        count, width, unreadable = count + len(part.embedding_nD), part.embedding_nD.shape[1], unreadable + part.unreadable
        stretched = stretched.and_then(part.stretched)
    lines = "".join(f"{printable(source.name(index))}\t{printable(reason)}\n" for index, reason in unreadable)
    if not count:
        shutil.rmtree(folder, ignore_errors=True)  # or the same command would find these images unreadable again, mended or not
        name, _, reason = lines.partition("\n")[0].partition("\t")
        raise ValueError(f"{source.path}: none of its {len(source)} images can be decoded, such as {name}: {reason}")
    files = embedding_files.beside(out)
    inside = [os.path.join(folder, os.path.basename(file)) for file in files]
    listing = os.path.join(folder, "unreadable.txt")
    for file in (listing, *inside):
        with suppress(FileNotFoundError):
            os.remove(file)  # of one that was broken off here
    embedding_files.write(inside, (_rows(folder, number, source) for number in chunks), count, width, {**job, "rows": count})
    if unreadable:
        with open(listing, "x", encoding="utf-8") as text:
            text.write(lines)
        files, inside = [_unreadable(out), *files], [listing, *inside]
    for path, file in zip(files, inside, strict=True):
        sync(file)
        if path == out or not (os.path.isfile(path) and filecmp.cmp(path, file, shallow=False)):  # else ours, of one broken off here
            check_new(path)
    for path, file in zip(files, inside, strict=True):  # OUT is the last
        os.rename(file, path)
    sync(os.path.dirname(os.path.abspath(out)))
    shutil.rmtree(folder, ignore_errors=True)
    return count, width, len(unreadable), stretched


def _rows(folder: str, number: int, source: Source) -> Rows:
    part = _chunk(folder, number)
    index_n = part.index_n.tolist()
    return Rows(part.embedding_nD, [source.name(i) for i in index_n], [source.identities[source.labels[i]] for i in index_n])


def _chunk(folder: str, number: int) -> Part:
    found = _read(folder, number)
    if found is None:
        raise ValueError(f"{_chunk_file(folder, number)} has gone or is damaged: give the same command again")
    return found


def _unreadable(out: str) -> str:
    return f"{out}.unreadable.txt"
