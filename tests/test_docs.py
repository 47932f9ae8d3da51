"""What the documentation tells readers to run, and where its links lead."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import torch

from partial_fc import losses
from tests.partial_fc.losses.parity import check_finite, check_finite_differences, cosines, exact, largest_error, step

ROOT = Path(__file__).resolve().parents[1]


def python_block(page: str) -> str:
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)
    return block


def pages() -> list[Path]:
    return sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


def anchors(page: Path) -> set[str]:
    """Of the headings of a page, as GitHub makes them: lower case, punctuation left out, hyphens for spaces, a number for the repeated."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    found: dict[str, int] = {}
    for heading in re.findall(r"^#{1,6} (.+)$", text, re.MULTILINE):
        name = re.sub(r"[^\w\- ]", "", re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading).lower()).replace(" ", "-")
        found[name] = found.get(name, -1) + 1
    return {name if not number else f"{name}-{number}" for name, count in found.items() for number in range(count + 1)}


def broken_links(page: Path) -> list[str]:
    text = re.sub(r"^```.*?^```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not re.match(r"https?://", link) and (not target.exists() or (anchor and anchor not in anchors(target))):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    assert broken_links(page) == []


def test_broken_links_are_found(tmp_path):
    (tmp_path / "other.md").write_text("# Two words: `here`\n## Twice\n## Twice\n```\n# no heading\n```\n")
    page = tmp_path / "page.md"
    page.write_text("[a](other.md#two-words-here) [b](other.md#twice-1) [c](https://x.org/y) `[d](none.md)` [e](#own)\n# Own\n")
    assert broken_links(page) == []
    page.write_text("[a](none.md) [b](other.md#no-heading) [c](other.md#twice-2) [d](#own)\n")
    assert broken_links(page) == ["none.md", "other.md#no-heading", "other.md#twice-2", "#own"]


def test_every_module_of_dali_loaders_has_its_place():
    """In the table of the architecture, once; a name without a folder stands in that of the one before it."""
    table = (ROOT / "docs" / "architecture.md").read_text().partition("### dali_loaders")[2].partition("### ")[0]
    listed = []
    for cell in re.findall(r"^\| (`[^|]*) \|", table, re.MULTILINE):
        folder = ""
        for name in re.findall(r"`(.*?)`", cell):
            folder = name.rpartition("/")[0] or folder
            listed.append(f"{folder}/{name.rpartition('/')[2]}".lstrip("/"))
    room = ROOT / "dali_loaders"
    assert sorted(listed) == sorted(str(path.relative_to(room)) for path in room.rglob("*.py") if path.name != "__init__.py")


def focal_cosface(dense, scale, margin, focus):
    """Of docs/adding-a-loss.md, dense."""
    target, others = cosines(dense)
    right, wrong = torch.exp(scale * (target - margin)), torch.exp(scale * others).sum(dim=1)
    return ((wrong / (right + wrong)) ** focus * torch.log((right + wrong) / right)).mean()


def test_the_example_of_adding_a_loss(tmp_path, monkeypatch):
    (tmp_path / "adding_a_loss.py").write_text(python_block("adding-a-loss.md"))
    monkeypatch.syspath_prepend(tmp_path)
    try:
        importlib.import_module("adding_a_loss")
        parameters = {"scale": 16.0, "margin": 0.2, "focus": 2.0}
        for rate in (1.0, 0.4):
            found = step("focal_cosface", parameters, torch.float64, rate, "random", {})
            assert largest_error([found], exact("focal_cosface", parameters, focal_cosface, torch.float64, rate)) < 1e-9
        check_finite("focal_cosface", {"scale": 64.0})
        check_finite_differences("focal_cosface", parameters)
        with pytest.raises(ValueError, match="focus is 11"):
            losses.build("focal_cosface", focus=11)
        with pytest.raises(ValueError, match="did you mean 'focal_cosface'"):
            losses.build("focal_cosfaze")
    finally:
        losses.REGISTRY.pop("focal_cosface", None)
