"""TensorBoard's pages in a real browser: they load, and show what the monitor wrote. Debian: apt-get install chromium."""

from __future__ import annotations

import asyncio
import contextlib
import re
import shutil
import subprocess
import sys
import time

import matplotlib.figure
import numpy as np
import pytest

from pipeline.monitor import Monitor
from pipeline.monitor.names import FIRST_PAGE

aiohttp = pytest.importorskip("aiohttp", reason="aiohttp, which comes with ray, talks to the browser")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no browser here: apt-get install chromium")]

# All text, sizes of pictures and counts of curves, also inside the shadow trees and frames of TensorBoard's elements.
SEEN = """(() => {
  const texts = [], pictures = []; let curves = 0;
  const walk = node => {
    if (node.nodeType == Node.TEXT_NODE) { if (node.data.trim()) texts.push(node.data.trim()); return }
    if (node.tagName == 'STYLE' || node.tagName == 'SCRIPT') return;
    if (node.tagName == 'IMG') pictures.push([node.naturalWidth, node.naturalHeight]);
    if (node.tagName == 'path' || node.tagName == 'CANVAS') curves++;
    if (node.shadowRoot) walk(node.shadowRoot);
    if (node.tagName == 'IFRAME' && node.contentDocument) walk(node.contentDocument);
    for (const child of node.childNodes) walk(child);
  };
  walk(document.body);
  return {text: texts.join(' | '), pictures, curves};
})()"""


@contextlib.contextmanager
def started(command, pattern):
    """A program, and what `pattern` finds in its output."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        deadline, lines = time.monotonic() + 60, []
        while not lines or not (found := re.search(pattern, lines[-1])):
            lines.append(process.stdout.readline())
            assert lines[-1] and time.monotonic() < deadline, "".join(lines)
        yield found[1]
    finally:
        process.kill()
        process.wait()


class Tab:
    """A page, by the protocol of Chrome's developer tools."""

    def __init__(self, socket):
        self.socket, self.number = socket, 0

    async def call(self, method, **parameters):
        self.number += 1
        await self.socket.send_json({"id": self.number, "method": method, "params": parameters})
        while True:
            answer = await self.socket.receive_json()
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]

    async def look(self, address, is_there):
        """What the page shows once `is_there`; after a minute as it is."""
        await self.call("Page.navigate", url="about:blank")
        await self.call("Page.navigate", url=address)
        for _ in range(120):
            await asyncio.sleep(0.5)
            result = await self.call("Runtime.evaluate", expression=SEEN, returnByValue=True)
            seen = result["result"].get("value")
            if seen and is_there(seen):
                break
        return seen


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """Of a TensorBoard that shows a run."""
    folder = tmp_path_factory.mktemp("runs") / "my_run"
    monitor = Monitor(folder, total_steps=40, console=False, options={"run.batch": 64.0, "loss": "cosface"})
    rng = np.random.default_rng(0)
    for step in range(0, 41, 4):
        monitor.scalars(step, {"loss": 10 - step / 5, "target_cosine": step / 50, "images_per_second": 1000.0, "gradient_norm": 1.0})
        monitor.evaluation(step, "test", {"eer": 0.5 - step / 100, "tar_at_far/1e-3": step / 50, "images": 4000}, 0.3)
        monitor.histogram(
            step, "evaluation/test/genuine_cosines", np.histogram(rng.normal(0.5, 0.1, 1000), 64, (-1, 1))[0], np.linspace(-1, 1, 65)
        )
    figure = matplotlib.figure.Figure(figsize=(4, 3))
    figure.subplots().plot([0, 1])
    monitor.figure(40, "evaluation/test/roc", figure)
    monitor.points(40, "test", rng.standard_normal((50, 8)).astype(np.float32), ["anna"] * 50, np.full((50, 8, 8, 3), 99, np.uint8))
    monitor.outcome({"test/eer": 0.1})
    monitor.close()
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder / "tensorboard"), "--port", "0", "--host", "127.0.0.1"]
    with started(command, r"at (http://127\.0\.0\.1:\d+)/") as found:
        yield found


async def visit(endpoint, address, pages):
    async with aiohttp.ClientSession() as session:
        host = re.match(r"ws://([^/]+)/", endpoint)[1]
        async with session.put(f"http://{host}/json/new?about:blank") as answer:
            tab_address = (await answer.json())["webSocketDebuggerUrl"]
        async with session.ws_connect(tab_address, max_msg_size=0) as socket:
            tab = Tab(socket)
            return {page: await tab.look(f"{address}/#{page}", is_there) for page, is_there in pages.items()}


def test_pages_load_and_figures_are_there(address, tmp_path):
    titles = [title for charts in FIRST_PAGE.values() for title in charts]
    pages = {
        "custom_scalars": lambda seen: all(title in seen["text"] for title in [*FIRST_PAGE, *titles]) and seen["curves"] > 20,
        "timeseries": lambda seen: "cosines | /target" in seen["text"] and "my_run" in seen["text"] and "train | 2 cards" in seen["text"],
        "images": lambda seen: [400, 300] in seen["pictures"] and "evaluation/test/roc" in seen["text"],
        "distributions": lambda seen: "evaluation/test/genuine_cosines" in seen["text"] and seen["curves"] > 5,
        "text": lambda seen: "4,000" in seen["text"] and "evaluation/test/table" in seen["text"],
        "hparams": lambda seen: "run.batch" in seen["text"] and "evaluation/test/eer" in seen["text"],
        "projector": lambda seen: re.search(r"Points:[ |]*50", seen["text"]) and "test at step 40" in seen["text"],
    }
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1600,1400"]
    command = [CHROMIUM, *options, f"--user-data-dir={tmp_path}", "--remote-debugging-port=0", "about:blank"]
    with started(command, r"DevTools listening on (ws://\S+)") as endpoint:
        found = asyncio.run(visit(endpoint, address, pages))
    missing = {page: found[page] for page, is_there in pages.items() if not (found[page] and is_there(found[page]))}
    assert not missing
