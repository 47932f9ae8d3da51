"""What of a host's software must be the same on every host: the checkout, Python and the packages. Each is a short text that compares."""

import hashlib
import importlib.metadata
import platform
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("partial_fc", "dali_loaders", "pipeline", "launch")
PACKAGES = ("torch", "ray", "deepspeed", "nvidia-dali", "numpy")


def software() -> dict[str, str]:
    """`commit`, with `+` and a digest where files of the checkout differ from it; `source`, a digest of the project's Python; `python`; and
    each of PACKAGES, "" where it is not installed."""
    return {"commit": commit(), "source": source(), "python": platform.python_version()} | {name: installed(name) for name in PACKAGES}


def commit() -> str:
    """ "" where the checkout is a copy without git."""
    try:
        head = git("rev-parse", "--short=10", "HEAD")
        changes = git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return ""
    return f"{head}+{source()[:6]}" if changes else head


def git(*arguments: str) -> str:
    # Git refuses a checkout of another user, which one on a shared file system may be.
    command = ["git", "-c", f"safe.directory={ROOT}", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()


def source() -> str:
    """Of what runs, whether git knows it or not."""
    digest = hashlib.sha256()
    for path in sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py")):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def installed(package: str) -> str:
    """The version of a distribution, or of the one whose name goes on with a platform, as nvidia-dali-cuda130."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        names = ((found.metadata["Name"] or "", found.version) for found in importlib.metadata.distributions())
        return next((version for name, version in names if name.lower().replace("_", "-").startswith(f"{package}-cuda")), "")
