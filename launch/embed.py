"""Embeddings of a large set as a job of Ray Data: `python -m launch.embed MODEL IMAGES OUT`. OUT is a folder of Parquet files; those
that are there and whole are not made again. On a private Ray here, or on the cluster that this machine is a part of."""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import re
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from dali_loaders.config import DataConfig
from dali_loaders.names import printable
from dali_loaders.remote import is_remote, without_secrets
from dali_loaders.sources import Source
from launch.checkout import ROOT
from launch.cluster import started
from launch.embed_worker import Account, Task, Worker, account, name_of
from launch.hosts import Host
from pipeline import stopping
from pipeline.commands import count
from pipeline.export.embed_images import Stretched

IMAGES = 16_384  # of a file, about; a whole number of batches
CPUS = 4  # of a worker
JOB, DONE, UNREADABLE = "_job.json", "_done.json", "_unreadable.txt"  # readers of Parquet folders pass over names with a _


class Interrupted(KeyboardInterrupt):
    """By a signal: what is done stays."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0; 1 where images were unreadable and left out, or something failed; 2 bad input; 75 stopped by a signal."""
    options = parser().parse_args(arguments)
    ours = [number for number in stopping.SIGNALS if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)]
    before = {number: signal.signal(number, interrupt) for number in ours}  # nohup ignores SIGHUP
    try:
        return embed(options)
    except ValueError as error:
        say(str(error))
        return 2
    except BrokenPipeError:
        raise
    except OSError as error:  # a full disk, or a folder that is not this user's
        say(f"{printable(str(error.filename or options.out))} cannot be read or written ({error.strerror or error})")
        return 2
    except RuntimeError as error:
        say(f"{error}: the same command goes on with what is missing")
        return 1
    except Interrupted as interruption:
        say(f"stopped by {interruption}: the same command goes on with what is missing")
        return stopping.STOPPED
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m launch.embed",
        description="Embed a set of any size on many machines, into a folder of Parquet files. The same command goes on where it stopped.",
        epilog="example: python -m launch.embed model/ /data/glint360k/train.rec /shared/embeddings --address head:6379 --workers 4:64",
    )
    parser.add_argument("model", metavar="MODEL", help="what `protoshard export` made, a run or a checkpoint, for all machines to see")
    parser.add_argument("images", metavar="IMAGES", help="as for `protoshard embed`")
    parser.add_argument("out", metavar="OUT", help="a folder that all machines see, new or of the same command")
    parser.add_argument("--address", metavar="HOST:PORT", help="the head of a Ray cluster that this machine is a part of (a private one)")
    parser.add_argument("--workers", type=bounds, metavar="MIN:MAX", help="how many, as machines come and go (1 to what there is room for)")
    parser.add_argument("--cpus-per-worker", type=count, metavar="N", help=f"({CPUS}, or fewer where the machine has fewer)")
    parser.add_argument("--images-per-file", type=count, default=IMAGES, metavar="N", help=f"about ({IMAGES})")
    parser.add_argument("--ema", action="store_true", help="of a run the averaged weights")
    parser.add_argument("--recipe", metavar="FILE.py", help="that registers a network of one's own; it is run")
    parser.add_argument("--no-flip", action="store_true", help="without the features of the mirror image")
    parser.add_argument("--decoder", default="auto", choices=("auto", "dali", "opencv"), help="(auto: DALI where it is installed)")
    return parser


def bounds(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not MIN:MAX with 1 <= MIN <= MAX, such as 1:16")
    return int(match[1]), int(match[2])


def embed(options: argparse.Namespace) -> int:
    """All that can be refused is refused before Ray starts."""
    from pipeline.distributed import cores, join
    from pipeline.export import embed_set
    from pipeline.export.images import open_images
    from pipeline.export.model_folder import open_model
    from pipeline.export.new_folder import refuse_remote
    from pipeline.same_data import open_on_all_ranks

    for name in ("images_per_file", "cpus_per_worker"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}, but must be at least 1")
    refuse_remote(options.out)
    out = os.path.abspath(options.out)
    check_folder(out)
    join("cpu")  # a group of one, for what is written for ranks
    about = open_model(options.model, ema=options.ema, recipe=options.recipe, device="cpu").description
    source, fingerprint = open_on_all_ranks(options.images, lambda: open_images(options.images, DataConfig(image_size=about.image_size)))
    size = max(1, options.images_per_file // about.batch_size) * about.batch_size
    job = {
        "model": about.weights,
        "flip": about.flip and not options.no_flip,
        "decoder": "dali" if embed_set.uses_dali_for(options.decoder) else "opencv",
        "images_per_file": size,
        "set": fingerprint,
        "place": embed_set.place_of(options.images),
    }
    lock, fault = embed_set.begin(out, job, JOB)
    if fault:
        raise ValueError(fault)
    assert lock is not None
    try:
        remove_unfinished(out)
        parts = range(-(-len(source) // size))
        found = {number: account(out, number, job) for number in parts}
        todo = [number for number in parts if found[number] is None]
        if len(todo) < len(parts):
            say(f"{len(parts) - len(todo):,} of {len(parts):,} files are there")
        if todo:
            with suppress(FileNotFoundError):
                os.unlink(os.path.join(out, DONE))
            images = ",".join(path if is_remote(path) else os.path.abspath(path) for path in map(str.strip, options.images.split(",")))
            cpus = options.cpus_per_worker or min(CPUS, cores())
            recipe = options.recipe and os.path.abspath(options.recipe)
            task = Task(os.path.abspath(options.model), images, out, job, options.ema, recipe, cpus)
            with ray_cluster(options.address):
                make(task, todo, options.workers, len(source))
            found |= {number: account(out, number, job) for number in todo}
        return finish(out, job, source, found, options.images, about)
    finally:
        os.close(lock)


def check_folder(out: str) -> None:
    """ValueError where OUT is something else, such as a run."""
    if os.path.exists(out) and not os.path.isdir(out):
        raise ValueError(f"{printable(out)} is a file, but OUT is a folder of Parquet files: choose another name")
    if os.path.isdir(out) and os.listdir(out) and not os.path.exists(os.path.join(out, JOB)):
        raise ValueError(f"{printable(out)} holds other things than embeddings that this command has begun: choose another name")


def remove_unfinished(out: str) -> None:
    """Files of workers that were killed while they wrote."""
    for name in os.listdir(out):
        if re.match(r"\.(part-\d{6}\.parquet|_\w+)\.", name):
            with suppress(FileNotFoundError):
                os.unlink(os.path.join(out, name))


@contextmanager
def ray_cluster(address: str | None) -> Iterator[None]:
    """Connected to the cluster at `address`, or to a private one, which listens to this machine alone, asks for a token, and keeps its
    files in a folder that only its user can enter."""
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # of this process: lines for those who develop Ray
    with ExitStack() as stack:
        is_private = address is None
        if address is None:
            try:
                running = stack.enter_context(started([Host("localhost", "localhost", None, True)], str(ROOT), sys.executable))
            except ValueError as error:  # a slow machine is no bad input
                raise RuntimeError(str(error).rstrip(".")) from None
            address = running.head
            # Read when Ray is imported. It would take another address of this machine for 127.0.0.1.
            os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=running.token, RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0")
        else:
            look_at(address)
        import ray

        stack.callback(ray.shutdown)
        try:
            variables = {"PYTHONPATH": os.environ["PYTHONPATH"]}
            ray.init(address, logging_level=logging.ERROR, log_to_driver=False, runtime_env={"env_vars": variables})
        # Ray raises anything from ConnectionError to AuthenticationError, and SystemExit when the control store does not answer.
        except (Exception, SystemExit) as error:
            reason = "no control store answers there" if isinstance(error, SystemExit) else first_line(error)
            if is_private:
                raise RuntimeError(f"the Ray that was started here cannot be used ({reason})") from None
            raise ValueError(
                f"the Ray cluster at --address {address} cannot be used ({reason}): run this on a machine that is a part of it, with "
                "RAY_AUTH_MODE and RAY_AUTH_TOKEN if it asks for a token"
            ) from None
        yield


def look_at(address: str) -> None:
    """ValueError unless what answers there may be the head of a cluster: Ray itself would wait for minutes."""
    from launch import connecting  # imports Ray, which reads then how its cluster is to be talked to

    try:
        host, port, scheme = connecting.parts(address)
    except ValueError:
        scheme = "none"
    if scheme:
        raise ValueError(f"--address {address} is not the head of a Ray cluster: give its host:port, such as node1:6379")
    connecting.reach(address, host, port)
    if os.environ.get("RAY_USE_TLS") != "1":
        connecting.look_for_head(address, host, port)


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def make(task: Task, todo: list[int], workers: tuple[int, int] | None, images: int) -> None:
    """Makes the parts `todo`, on as many workers as there is room for. A worker that dies is replaced, and its parts are made by others.
    ValueError: what a worker found wrong with its input. RuntimeError: Ray gave up."""
    import ray
    import ray.data

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = 1 if any(node.get("GPU", 0) >= 1 for node in nodes) else 0
    room = sum(int(min(node.get("CPU", 0) / task.cpus, node.get("GPU", 0) if gpus else math.inf)) for node in nodes)  # node by node
    least, most = workers or (1, max(1, room))
    each = f"{task.cpus} processors{' and a GPU' if gpus else ''}"
    if room < least:
        raise ValueError(
            f"the Ray cluster has room for {room} workers of {each}, fewer than {least}: give other --workers or --cpus-per-worker"
        )
    say(f"{len(todo):,} files, {least} to {most} workers, each with {each}")
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    parts = ray.data.from_items([{"part": number} for number in todo], override_num_blocks=len(todo))
    made = parts.map(
        Worker,  # type: ignore[arg-type]
        compute=ray.data.ActorPoolStrategy(min_size=least, max_size=most, max_tasks_in_flight_per_actor=2),
        fn_constructor_args=(task,),
        num_cpus=task.cpus,
        num_gpus=gpus,
    )
    began = said = time.monotonic()
    done = 0
    try:
        for number, row in enumerate(made.iter_rows(), 1):
            if row["fault"]:
                raise ValueError(row["fault"])
            done += row["images"]
            now = time.monotonic()
            if number == len(todo) or now - said > 10:
                said, rate = now, done / (now - began)
                left = math.ceil((len(todo) - number) / number * (now - began))
                say(f"{number:,} of {len(todo):,} files, {rate:,.0f} images/s" + (f", {left:,} s left" if left else ""))
    except ray.exceptions.RayError as error:
        raise RuntimeError(f"Ray gave up ({first_line(error)})") from None


def finish(out: str, job: dict[str, Any], source: Source, found: dict[int, Account | None], images: str, about: Any) -> int:
    missing = [number for number, one in found.items() if one is None]
    if missing:
        raise RuntimeError(f"{name_of(missing[0])} and {len(missing) - 1} others are missing or damaged")
    accounts = [one for _, one in sorted(found.items()) if one is not None]
    unreadable = [each for one in accounts for each in one.unreadable]
    rows, stretched = sum(one.rows for one in accounts), Stretched()
    for one in accounts:
        stretched = stretched.and_then(one.stretched)
    lines = "".join(f"{printable(source.name(index))}\t{printable(reason)}\n" for index, reason in unreadable)
    if unreadable:
        write_text(out, UNREADABLE, lines)
    if not rows:
        name, _, reason = lines.partition("\n")[0].partition("\t")
        raise ValueError(f"{source.path}: none of its {len(source)} images can be decoded, such as {name}: {reason}; remove {out}")
    write_text(out, DONE, json.dumps({**job, "rows": rows, "unreadable": len(unreadable), "files": len(accounts)}) + "\n")
    remark = stretched.remark(without_secrets(images), rows, about)
    if remark:
        say(remark)
    width = about.backbone.width
    print(f"{printable(out)}: {rows:,} embeddings of {width} numbers in {len(accounts):,} files, decoded by {job['decoder']}", flush=True)
    if unreadable:
        say(f"{len(unreadable):,} images cannot be read and are left out: {printable(os.path.join(out, UNREADABLE))}")
    return 1 if unreadable else 0


def write_text(out: str, name: str, text: str) -> None:
    path, temporary = Path(out, name), Path(out, f".{name}.{os.getpid()}")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def interrupt(number: int, frame: object) -> None:
    raise Interrupted(signal.Signals(number).name)


def say(message: str) -> None:
    print(f"embed: {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
