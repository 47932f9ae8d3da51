"""What became of everything that a source saw: used, or passed over and why. Nothing is left out of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from dali_loaders.remote import without_secrets

EXAMPLES = 5  # names kept of each reason; the rest is only counted


@dataclass
class Passed:
    """Things passed over for one reason."""

    count: int = 0
    examples: list[str] = field(default_factory=list)


@dataclass
class Account:
    """seen = used + what was passed over, always. Counts files, tar members or records, but no headers of a set."""

    seen: int = 0
    used: int = 0
    passed_over: dict[str, Passed] = field(default_factory=dict)  # by reason, which is a few words such as "no image by its content"

    def use(self, count: int = 1) -> None:
        self.seen += count
        self.used += count

    def pass_over(self, reason: str, name: str, count: int = 1) -> None:
        """`count` things, of which `name` is one."""
        self.seen += count
        passed = self.passed_over.setdefault(reason, Passed())
        passed.count += count
        if len(passed.examples) < EXAMPLES:
            passed.examples.append(name)

    def admits(self, name: str, reason: str | None) -> bool:
        """Counts one thing as used where there is no reason against it, else as passed over."""
        if reason is None:
            self.use()
        else:
            self.pass_over(reason, name)
        return reason is None

    def add(self, other: Account) -> None:
        """The account of another part of the same set."""
        self.use(other.used)
        for reason, passed in other.passed_over.items():
            mine = self.passed_over.setdefault(reason, Passed())
            mine.count += passed.count
            mine.examples = (mine.examples + passed.examples)[:EXAMPLES]
            self.seen += passed.count

    def lines(self) -> Iterator[str]:
        """For people: one line, and one for each reason."""
        yield f"{self.seen} seen, {self.used} used, {self.seen - self.used} passed over"
        for reason, passed in self.passed_over.items():
            more = ", ..." if passed.count > len(passed.examples) else ""
            yield f"  {passed.count} {reason}: {', '.join(passed.examples)}{more}"

    def remarks(self, path: str) -> list[str]:
        """The lines for the set `path`; none where nothing was passed over."""
        first, *reasons = self.lines()
        return [f"{without_secrets(path)}: {first}", *reasons] if self.passed_over else []

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        passed = {reason: {"count": passed.count, "examples": passed.examples} for reason, passed in self.passed_over.items()}
        return {"seen": self.seen, "used": self.used, "passed_over": passed}


class ReadError(ValueError):
    """The bytes of one image cannot be had; str() is the reason, a few words."""

    @staticmethod
    def of(error: OSError) -> ReadError:
        """For an error of the system, by its own words: "Permission denied" becomes "permission denied"."""
        words = error.strerror or str(error) or type(error).__name__
        return ReadError(words[0].lower() + words[1:])


class ChangedError(ValueError):
    """A set is no longer what it was when it was opened, so that a label may belong to another image: this ends a run. It is no
    ReadError, which one image is left out for."""


class StorageError(ValueError):
    """The machine, and not a file, keeps images from being read: the run cannot go on."""


@dataclass(frozen=True)
class Unreadable:
    """In place of an image's bytes: why there are none that can be decoded, in a few words."""

    reason: str
