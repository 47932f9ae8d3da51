"""The unreadable images of a run: the log, the list on disk, and when there are too many of them to go on."""

from __future__ import annotations

import fcntl
import logging
import os
from collections import Counter

from dali_loaders.names import printable
from dali_loaders.regular import open_regular
from dali_loaders.sources import Source
from dali_loaders.waiting import waiting

MAX_SKIPPED = 0.01  # share of unreadable images that ends a run
_JUDGED = 10_000  # reads, or the size of a smaller set, below which chance could mislead a rank about that share

log = logging.getLogger(__name__)


class Skipped:
    """Which images of `source` are known to be unreadable, and why. `path`: a file that lists them, one line 'name<tab>reason' each, for
    all ranks and all resumes of a run together."""

    def __init__(self, source: Source, path: str | None) -> None:
        self.names: list[str] = []
        self.reasons: Counter[str] = Counter()
        self._source, self._path = source, path
        self._known: set[int] = set()
        self._listed: set[bytes] = set()  # lines of the file up to byte _looked
        self._looked = 0

    def __contains__(self, index: int) -> bool:
        return index in self._known

    def __len__(self) -> int:
        return len(self._known)

    def add(self, index: int, reason: str) -> None:
        if index in self._known:
            return
        name = self._source.name(index)
        log.warning("skipping unreadable image %s: %s", name, reason)
        self._known.add(index)
        self.names.append(name)
        self.reasons[reason] += 1
        if self._path is not None:
            self._list(self._path, name, reason)

    def why(self) -> str:
        """The most frequent reasons with their counts: "7 cut off, 2 permission denied"."""
        most = self.reasons.most_common(3)
        rest = len(self) - sum(count for _, count in most)
        return ", ".join([f"{count} {reason}" for reason, count in most] + ([f"{rest} for other reasons"] if rest else []))

    def stop_above(self, skipped_reads: int, reads: int) -> None:
        """Ends the run with a ValueError where more than 1 % of its reads, or of the set, are unreadable."""
        images = len(self._source)
        if skipped_reads > MAX_SKIPPED * max(reads, min(images, _JUDGED)) or len(self) > MAX_SKIPPED * images:
            where = f"they are listed in {self._path}" if self._path else f"the first are {', '.join(self.names[:3])}"
            raise ValueError(
                f"{max(skipped_reads, len(self))} unreadable images among the first {reads} of {self._source.path} are more than "
                f"{MAX_SKIPPED:.0%}: {self.why()}; {where}. Mend what these reasons name, or train on a set without them, which "
                f"protoshard data check {self._source.path} --fix CLEAN.rec writes."
            )

    def _list(self, path: str, name: str, reason: str) -> None:
        """Appends one line, unless this or another rank, or the run before a resume, has done so."""
        line = f"{printable(name)}\t{printable(reason)}\n".encode()  # the name as it is in messages, for data.exclude
        try:
            os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
            with open(path, "ab+", opener=open_regular) as file:
                with waiting(f"another rank, which holds {path}"):
                    fcntl.flock(file, fcntl.LOCK_EX)  # until it is closed
                file.seek(self._looked)
                self._listed.update(file)
                if line not in self._listed:
                    file.write(line)
                    self._listed.add(line)
                self._looked = file.tell()
        except OSError as error:  # a full disk, say: no reason to end a run, since the log has the name too
            log.warning("%s cannot be written (%s), so it lacks %s", path, error.strerror or error, printable(name))
