"""What a pack says in the end."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from dali_loaders.account import Account
from dali_loaders.names import printable


@dataclass
class PackReport:
    """What became of a source's images; str() of it is the text for people."""

    out: str  # what data.train is to be called with
    identities: int
    account: Account  # of the source's images: packed, or left out and why
    lost: list[str] = field(default_factory=list)  # identities of which no image could be packed
    left_out_list: str | None = None  # file with lines name<tab>reason of all that was left out
    unused_landmarks: list[str] = field(default_factory=list)  # paths of lines that name no image of the source

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "path": self.out,
            "identities": self.identities,
            "images": self.account.as_dict(),
            "lost": [printable(name) for name in self.lost],
            "left_out_list": self.left_out_list,
        }

    def _lines(self) -> Iterator[str]:
        yield f"{self.account.used} images of {self.identities} identities in {shlex.quote(self.out)}"  # braces, which a shell would expand
        if self.left_out_list:
            yield f"left out: {self.account.seen - self.account.used} of {self.account.seen} images, listed in {self.left_out_list}"
            yield from list(self.account.lines())[1:]
        if self.lost:
            yield f"identities without a packed image, so left out: {_some(self.lost)}"
        if self.unused_landmarks:
            yield f"landmarks without an image: {_some(self.unused_landmarks)}"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{len(names)} ({', '.join(map(printable, names[:5]))}{more})"
