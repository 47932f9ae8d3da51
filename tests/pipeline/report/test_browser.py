"""The page in a real browser: its figures are there, it loads nothing, and runs nothing. Debian: apt-get install chromium."""

from __future__ import annotations

import base64
import html
import json
import re
import shutil
import subprocess

import numpy as np
import pytest

from pipeline import report
from pipeline.monitor.pictures import jpeg_of
from tests.pipeline.report import folders
from tests.pipeline.report.test_write import HOSTILE

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no browser here: apt-get install chromium")]
OPTIONS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-pdf-header-footer"]

# A page around it tells what it shows, because it runs no script of its own.
AROUND = """<iframe src="out.html" width="1200" height="900"></iframe><pre></pre><script>
onload = () => {
  const frame = document.querySelector('iframe'), page = frame.contentDocument;
  const images = [...page.images].map(image => [image.naturalWidth, image.naturalHeight]);
  const entries = frame.contentWindow.performance.getEntriesByType('resource');
  const loaded = entries.map(one => one.name).filter(name => !name.startsWith('data:'));
  const wide = page.documentElement.scrollWidth;
  const seen = {images, loaded, wide, hacked: !!frame.contentWindow.hacked, text: page.body.innerText, title: page.title};
  document.querySelector('pre').textContent = JSON.stringify(seen);
}
</script>"""


def browse(folder, address, *options):
    command = [CHROMIUM, *OPTIONS, f"--user-data-dir={folder}/browser", *options, address]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def test_the_page_shows_its_figures_and_loads_nothing(tmp_path):
    runs = [
        folders.run(tmp_path / name, reports={0: folders.report(0, 0.5), 100: folders.report(seed)})
        for seed, name in enumerate((HOSTILE, "_b"))
    ]
    jpeg = base64.b64encode(jpeg_of(np.full((8, 17, 3), 99, np.uint8))).decode()
    pairs = [{"cosine": 0.5, "identities": [HOSTILE, "</figcaption><script>hacked=1</script>"], "jpeg": jpeg}]
    (runs[0] / "hard-pairs-test.json").write_text(json.dumps({"of": folders.OF, "step": 100, "images": 300, "genuine": pairs}))
    report.write([str(run) for run in runs], str(tmp_path / "out.html"))
    (tmp_path / "around.html").write_text(AROUND)
    dom = browse(tmp_path, f"file://{tmp_path}/around.html", "--allow-file-access-from-files", "--virtual-time-budget=20000", "--dump-dom")
    seen = json.loads(html.unescape(re.search(r"<pre>(.*)</pre>", dom, re.DOTALL)[1]))
    assert seen["loaded"] == [] and not seen["hacked"] and seen["wide"] <= 1200
    assert len(seen["images"]) >= 15 and all(width and height for width, height in seen["images"])
    assert HOSTILE in seen["title"] and HOSTILE in seen["text"] and "<script>hacked=1</script>" in seen["text"]
    browse(tmp_path, f"file://{tmp_path}/out.html", f"--print-to-pdf={tmp_path}/out.pdf")
    content = (tmp_path / "out.pdf").read_bytes()
    assert content.startswith(b"%PDF") and 3 <= len(re.findall(rb"/Type\s*/Page\b", content)) <= 15
