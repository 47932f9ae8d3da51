"""The command `protoshard report`."""

from __future__ import annotations

import argparse

from pipeline.commands import command


def add(commands: argparse._SubParsersAction) -> None:
    """Adds it to the commands of `protoshard`."""
    report = command(commands, "report", _report, "make a page of one run or several", "protoshard report runs/a runs/b --out a-b.html")
    report.add_argument("runs", metavar="RUN", nargs="+", help="the folder of a run, complete or not; several are compared")
    report.add_argument("--out", default="report.html", metavar="FILE.html", help="the page, which loads nothing else (report.html)")
    more = "also what `protoshard eval RUN ... --json` printed into this file; may be repeated"
    report.add_argument("--add", action="append", default=[], metavar="FILE.json", help=more)


def _report(options: argparse.Namespace) -> None:
    from dali_loaders.names import quoted
    from dali_loaders.progress import announce

    announce("starting")
    from pipeline import report

    size = report.write(options.runs, options.out, options.add)
    print(f"{quoted(options.out)}: {size / 1e6:.1f} MB, for any browser")
