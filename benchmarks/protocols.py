"""How long the large protocols take from their lists and features to the report, and how much memory: `python -m benchmarks.protocols`.

Lists and features are drawn, in the real numbers and layouts. Each form runs in a process of its own, whose memory at its peak counts."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import record
from pipeline.evaluation import megaface_lists, template_lists
from pipeline.evaluation.protocols import ijb, megaface
from pipeline.evaluation.report import Report

WIDTH = 512
IJBC = {"subjects": 3_531, "templates": 23_124, "images": 469_375, "pairs": 15_658_489}
MEGAFACE = {"identities": 80, "probes": 3_530, "distractors": 1_000_000, "noisy_probes": 100, "noisy_distractors": 700}


def rows(ijbc: dict[str, int] | None, mega: dict[str, int] | None, width: int = WIDTH) -> Iterator[dict[str, Any]]:
    """One for each of the forms of these numbers."""
    for form, numbers, write in ((_ijbc, ijbc, write_ijbc), (_megaface, mega, write_megaface)):
        if numbers:
            with tempfile.TemporaryDirectory() as folder:
                write(Path(folder), **numbers)
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                    yield pool.submit(form, folder, numbers, width, torch.get_num_threads()).result()


def write_ijbc(folder: Path, subjects: int, templates: int, images: int, pairs: int) -> None:
    """One template of each subject is of the gallery, the others are probes; a video has up to ten frames. Most pairs are impostors, of a
    gallery template and a probe, as in IJB-C."""
    rng = np.random.default_rng(0)
    meta = folder / "meta"
    meta.mkdir()
    subject = np.concatenate([np.arange(subjects), rng.integers(0, subjects, templates - subjects)])
    template = np.sort(np.concatenate([np.arange(templates), rng.integers(0, templates, images - templates)]))
    media = np.arange(images) // 10
    lines = (f"{n}.jpg {t} {m}\n" for n, (t, m) in enumerate(zip(template.tolist(), media.tolist(), strict=True)))
    (meta / "ijbc_face_tid_mid.txt").write_text("".join(lines))
    points = "38.29 51.69 73.53 51.5 56.02 71.73 41.54 92.36 70.72 92.2"
    lines = (f"{n}.jpg {points} {score:.6f}\n" for n, score in enumerate(rng.uniform(0.5, 1, images).tolist()))
    (meta / "ijbc_name_5pts_score.txt").write_text("".join(lines))
    with open(meta / "ijbc_template_pair_label.txt", "w") as file:
        probe = np.arange(subjects, templates)
        genuine = np.column_stack([subject[probe], probe])[:pairs]
        for start in range(0, pairs, 10**6):
            part = np.column_stack([rng.integers(0, subjects, 10**6), rng.integers(subjects, templates, 10**6)])[: pairs - start]
            if start == 0:
                part[: len(genuine)] = genuine
            same = (subject[part[:, 0]] == subject[part[:, 1]]).astype(int)
            file.writelines(f"{a} {b} {c}\n" for a, b, c in zip(*part.T.tolist(), same.tolist(), strict=True))
    for name, which in (("gallery_G1", np.arange(0, subjects, 2)), ("gallery_G2", np.arange(1, subjects, 2)), ("probe_mixed", probe)):
        lines = (f"{t},{s}\n" for t, s in zip(which.tolist(), subject[which].tolist(), strict=True))
        (meta / f"ijbc_1N_{name}.csv").write_text("TEMPLATE_ID,SUBJECT_ID\n" + "".join(lines))


def write_megaface(folder: Path, identities: int, probes: int, distractors: int, noisy_probes: int, noisy_distractors: int) -> None:
    names = [f"person{n % identities}/person{n % identities}_{n}.png" for n in range(probes)]
    (folder / "facescrub_lst").write_text("\n".join(names))
    (folder / "facescrub_noises.txt").write_text("\n".join(name.split("/")[1] for name in names[:noisy_probes]))
    names = [f"{n % 1000}/user{n % 7}/{n}.jpg" for n in range(distractors)]
    (folder / "megaface_lst").write_text("\n".join(names))
    (folder / "megaface_noises.txt").write_text("\n".join(names[:noisy_distractors]))


def _ijbc(folder: str, numbers: dict[str, int], width: int, threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    identity = np.loadtxt(os.path.join(folder, "meta", "ijbc_face_tid_mid.txt"), np.int64, usecols=1)
    features = _drawn(identity, width)  # of one template alike; subjects do not matter to the time
    return _measured("IJB-C", numbers, width, lambda: template_lists.read_lists(folder), lambda lists: ijb.compare(lists, features))


def _megaface(folder: str, numbers: dict[str, int], width: int, threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    nobody = np.arange(numbers["distractors"]) + numbers["identities"]
    rows_ND = _drawn(np.concatenate([np.arange(numbers["probes"]) % numbers["identities"], nobody]), width)
    rows_ND /= rows_ND.norm(dim=1, keepdim=True)
    return _measured(
        "MegaFace", numbers, width, lambda: megaface_lists.read_lists(folder),
        lambda lists: megaface.compare(lists, rows_ND, np.arange(len(rows_ND))),
    )  # fmt: skip


def _drawn(identity_N: np.ndarray, width: int) -> torch.Tensor:
    """float32 [N, width] around a centre of each identity, a block at a time: the peak is that of the protocol."""
    generator = torch.Generator().manual_seed(0)
    rows_ND = torch.empty(len(identity_N), width)
    for block, identity_n in zip(rows_ND.split(65536), np.array_split(identity_N, range(65536, len(identity_N), 65536)), strict=True):
        block.normal_(generator=generator).mul_(1.2)
        block += torch.from_numpy(np.sin(np.outer(identity_n + 1, np.arange(1, width + 1) ** 2)).astype(np.float32))
    return rows_ND


def _measured(what: str, numbers: dict[str, int], width: int, read: Callable[[], Any], compare: Callable[[Any], Report]) -> dict[str, Any]:
    load = os.getloadavg()[0]
    start, cpu = time.perf_counter(), time.process_time()
    lists = read()
    read_seconds = time.perf_counter() - start
    report = compare(lists)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
    with open("/proc/self/status") as file:
        peak = next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))
    group = next(iter(report.groups.values()))
    return {
        "what": what, "width": width, "numbers": [f"{name}={number}" for name, number in numbers.items()],
        "threads": torch.get_num_threads(), "read_seconds": round(read_seconds, 1), "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1), "peak_mib": peak // 1024, "load_before": round(load, 1),
        "genuine_pairs": report.genuine_pairs, "impostor_pairs": report.impostor_pairs, "group_rank1": group.rank1,
    }  # fmt: skip


def as_text(row: dict[str, Any]) -> str:
    return (
        f"{row['what']} ({', '.join(row['numbers'])}, width {row['width']}): {row['seconds']} s on {row['threads']} threads, of them "
        f"{row['read_seconds']} s for reading lists; {row['cpu_seconds']} s of processor time; peak {row['peak_mib']} MiB with the "
        f"features; {row['load_before']} processes ran or waited before"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("ijbc", "megaface"), help="one of the forms")
    parser.add_argument("--csv", default=os.path.join(record.FOLDER, "protocols.csv"))
    options = parser.parse_args()
    found = rows(IJBC if options.only != "megaface" else None, MEGAFACE if options.only != "ijbc" else None)
    record.report(found, as_text, False, options.csv)


if __name__ == "__main__":
    main()
