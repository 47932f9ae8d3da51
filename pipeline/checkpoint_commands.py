"""The `protoshard checkpoint` commands. They read what a checkpoint says, and run nothing of it; ranks and a GPU are not needed."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from dali_loaders.names import printable
from dali_loaders.progress import progress
from pipeline.commands import command

if TYPE_CHECKING:
    from pipeline.checkpoint import Checkpoint
    from pipeline.checkpoint.looking import Row

GROUPS = ("prototypes", "learned", "tracked", "bank", "backbone", "optimizer", "ema")  # by the beginning of a tensor's name
LONGEST = 160  # letters of a value that is shown
PATH = "a step-N folder; a folder of checkpoints, or a run's: the newest one; an address (s3://BUCKET/RUN/step-N)"


def add(commands: argparse._SubParsersAction) -> None:
    """Adds `checkpoint` to the commands of `protoshard`."""
    group = commands.add_parser("checkpoint", help="list, verify, show, compare and copy checkpoints")
    ours = group.add_subparsers(metavar="COMMAND", required=True)
    listing = command(ours, "list", _list, "list the checkpoints of a run", "protoshard checkpoint list runs/faces_small")
    listing.add_argument("folder", metavar="RUN|FOLDER|ADDRESS", help="a run's folder, or a folder of checkpoints, also s3://BUCKET/RUN")
    verify = command(ours, "verify", _verify, "read checkpoints and compare all checksums", "protoshard checkpoint verify runs/faces_small")
    verify.add_argument("paths", metavar="PATH", nargs="+", help="a step-N folder; a folder of checkpoints, or a run's: all in it")
    show = command(ours, "show", _show, "print what is in a checkpoint", "protoshard checkpoint show runs/faces_small --config")
    show.add_argument("path", metavar="PATH", help=PATH)
    show.add_argument("--tensors", action="store_true", help="also every tensor: type, shape, files")
    show.add_argument("--config", action="store_true", help="also the configuration it was written with")
    diff = command(ours, "diff", _diff, "compare two checkpoints", "protoshard checkpoint diff runs/a runs/b/checkpoints/step-00000750")
    diff.add_argument("first", metavar="A", help=PATH)
    diff.add_argument("second", metavar="B", help="likewise")
    diff.add_argument("--tensors", action="store_true", help="name each tensor whose contents differ, not only how many")
    copy = command(
        ours,
        "copy",
        _copy,
        "copy a checkpoint to another folder or store, verified, in the present format",
        "protoshard checkpoint copy runs/faces_small/checkpoints/step-00000750 s3://bucket/faces",
    )
    copy.add_argument("source", metavar="FROM", help=PATH)
    copy.add_argument("to", metavar="TO", help="a folder or address, for TO/step-N; or a new name step-N in one")
    for takes_json in (listing, verify, show, diff):
        takes_json.add_argument("--json", action="store_true", help="print one JSON object")


def _list(options: argparse.Namespace) -> None:
    from pipeline.checkpoint import looking

    rows = looking.listed(options.folder)
    if options.json:
        _print_json({"checkpoints": [asdict(row) for row in rows]})
        return
    figure = _figure(rows)
    best = looking.best_of({row.name: row.figures.get(figure) for row in rows if row.state == "complete"}, figure)
    head = ["checkpoint", "written", "size", "ranks", "format", *([figure] if figure else []), "what it is", "files"]
    table = [
        [
            row.name,
            _known(row.when),
            _size(row.bytes),
            _known(row.ranks),
            _known(row.format),
            *([_number(row.figures.get(figure)) + ("*" if row.name == best else "")] if figure else []),
            ", ".join([row.state] * (row.state != "complete") + row.kept) or "older",
            row.fault or "all there",
        ]
        for row in rows
    ]
    _print_table([head, *table])


def _figure(rows: list[Row]) -> str:
    """The one that is shown: what the run keeps the best of, else the first equal error rate."""
    for row in rows:
        for reason in row.kept:
            if reason.startswith("best "):
                return reason.removeprefix("best ")
    names = [name for row in rows for name in row.figures]
    return next((name for name in names if name.endswith("/eer")), names[0] if names else "")


def _verify(options: argparse.Namespace) -> int:
    """1 if any is damaged, else 2 if any could not be judged."""
    from pipeline.checkpoint import looking

    said = {"sound": "sound", "gone": "was removed or renamed while it was read", "damaged": "damaged: ", "unknown": "cannot be verified: "}
    results = []
    for store, name in [place for path in options.paths for place in looking.several(path)]:
        path = f"{store.path}/{name}"
        state, fault = looking.judged(store, name)
        results.append({"path": path, "state": state, "fault": fault})
        if not options.json:
            print(printable(f"{path}: {said[state]}{fault or ''}"), flush=True)
    if options.json:
        _print_json({"checkpoints": results})
    states = {result["state"] for result in results}
    return 1 if "damaged" in states else 2 if "unknown" in states else 0


def _show(options: argparse.Namespace) -> None:
    from pipeline.checkpoint import looking
    from pipeline.checkpoint.comparing import flat

    saved = looking.one(options.path)
    facts = _facts(saved) | {"format": looking.format_of(saved), "bytes": looking.size_of(saved)}
    groups, tensors, files = _groups(saved), looking.tensors(saved), looking.files(saved)
    if options.json:
        facts |= {"path": saved.path, "groups": groups, "files": files}
        facts |= {"tensors": tensors} if options.tensors else {}
        _print_json(facts | ({"config": saved.info.get("config")} if options.config else {}))
        return
    print(f"{printable(saved.path)} (its contents were not read: see verify)")
    _print_table([[name, _size(value) if name == "bytes" else _value(value)] for name, value in facts.items() if value is not None])
    print()
    _print_table([["group", "tensors", "size"], *([name, str(group["tensors"]), _size(group["bytes"])] for name, group in groups.items())])
    print()
    _print_table([["file", "size"], *([name, _size(size)] for name, size in files.items())])
    if options.tensors:
        print()
        rows = [[name, of["dtype"], str(of["shape"]), ", ".join(of["files"])] for name, of in tensors.items()]
        _print_table([["tensor", "type", "shape", "files"], *rows])
    if options.config:
        print()
        for name, value in flat(saved.info.get("config", {})).items():
            print(f"{printable(name)} = {_value(value)}")


def _facts(saved: Checkpoint) -> dict[str, Any]:
    info = saved.info
    facts = {name: info.get(name) for name in ("step", "consumed", "epoch", "when", "host", "world_size", "code", "started_from")}
    facts |= {name: info.get(name) for name in ("num_classes", "width", "backbone", "image_size", "optimizer", "batch", "figures")}
    with suppress(KeyError, TypeError):  # an imported one has no configuration
        facts["loss"] = info["config"]["loss"]["name"]
    return facts


def _groups(saved: Checkpoint) -> dict[str, dict[str, int]]:
    groups: dict[str, dict[str, int]] = {}
    for name in saved:
        found = groups.setdefault(_group(name), {"tensors": 0, "bytes": 0})
        found["tensors"] += 1
        found["bytes"] += math.prod(saved.shape(name)) * saved.dtype(name).itemsize
    return {group: groups[group] for group in (*GROUPS, "other") if group in groups}


def _group(name: str) -> str:
    return next((group for group in GROUPS if name.startswith(group)), "other")


def _diff(options: argparse.Namespace) -> int:
    """1 if they differ in more than when and where they were written."""
    from pipeline.checkpoint import comparing, looking

    first, second = looking.one(options.first), looking.one(options.second)
    info, config = comparing.said(first, second)
    kinds = comparing.kinds(first, second)
    with progress("bytes compared", looking.tensor_bytes(first)) as done:
        contents = comparing.contents(first, second, done.add)
    names = comparing.identities(first, second)
    equal = not (info.keys() - comparing.OF_THE_MOMENT or config.keys() - comparing.PLACES or kinds or contents or names)
    if options.json:
        found = {"equal": equal, "info": info, "config": config, "tensors": kinds, "contents": contents, "identities": names}
        _print_json({"first": first.path, "second": second.path, **found})
        return int(not equal)
    for title, pairs in (("", info), ("config.", config), ("tensor ", kinds)):
        for name, (ours, theirs) in pairs.items():
            print(f"{title}{printable(name)}: {_value(ours)} | {_value(theirs)}")
    _print_contents(contents, options.tensors)
    if names:
        counts = " | ".join("none" if count is None else str(count) for count in names["counts"])
        print(f"identities: {counts}; only in one of them {_value(names['only_in_one'])}, such as {_value(names['first_of_these'])}")
    print("equal" if equal else "different")
    return int(not equal)


def _print_contents(contents: dict[str, float], all_of_them: bool) -> None:
    by_group: dict[str, list[str]] = {}
    for name in contents:
        by_group.setdefault(_group(name), []).append(name)
    for group, names in by_group.items():
        # A count of steps says nothing about how far the others are apart.
        largest = max(names, key=lambda name: (not name.endswith(".step"), math.inf if math.isnan(contents[name]) else contents[name]))
        count = f"{len(names)} tensor{'s' * (len(names) > 1)}"
        print(f"{group}: the contents of {count} differ, most in {printable(largest)}, by {contents[largest]:.3g}")
        for name in names if all_of_them else []:
            print(f"  {printable(name)}: by at most {contents[name]:.3g}")


def _copy(options: argparse.Namespace) -> None:
    from pipeline.checkpoint import copying, looking

    options.when_broken_off = "; nothing was written"
    saved = looking.one(options.source)
    with progress("bytes copied and verified", copying.work(saved)) as done:
        path = copying.copy(saved, options.to, done.add)
    was = " and made one of format 2" if looking.format_of(saved) == 1 else ""
    print(f"{printable(saved.path)} copied to {printable(path)}{was}, and verified there")


def _print_json(values: dict[str, Any]) -> None:
    try:
        text = json.dumps(values)
        # A number that JSON does not know, from a checkpoint of anyone, becomes its name.
        print(json.dumps(json.loads(text, parse_constant=str)))
    except RecursionError:
        raise ValueError("the checkpoint's entries are nested too deeply to be shown") from None


def _print_table(rows: Iterable[list[str]]) -> None:
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _value(value: Any) -> str:
    """Of whatever a checkpoint says, on one line and of bounded length."""
    try:
        if isinstance(value, dict) and value:
            text = ", ".join(f"{name} {_known(inner)}" for name, inner in value.items())
        else:
            text = value if isinstance(value, str) else f"{value:.6g}" if isinstance(value, float) else json.dumps(value)
    except RecursionError:
        text = "nested too deeply to be shown"
    shown = printable(text)
    return shown if len(shown) <= LONGEST else shown[:LONGEST] + "..."


def _known(value: Any) -> str:
    return "-" if value is None else _value(value)


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else _known(value)


def _size(count: int | None) -> str:
    if count is None:
        return "-"
    for unit, bytes_of in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= bytes_of:
            return f"{count / bytes_of:.1f} {unit}"
    return f"{count} B"
