"""The page in a real browser (Chromium without a screen): it complains of nothing, draws every plot, fits a phone."""

import base64
import json
import re
import shutil
import subprocess
from html import unescape

import pytest

from ares_jax.reporting import build_report
from ares_jax.reporting.answers import answers_page
from tests.evaluation.images import png
from tests.reporting.test_report import write_run

NAMES = ("chromium-headless-shell", "chrome-headless-shell", "chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"no browser here; one of {', '.join(NAMES)} is needed")

# Run when all is loaded and drawn; what it finds is read from the page as the browser dumps it.
PROBE = """<script>addEventListener("load", () => {
  const scrolls = (e) => e && (["auto", "scroll"].includes(getComputedStyle(e).overflowX) || scrolls(e.parentElement));
  const sticking = [...document.querySelectorAll("body *")].filter(
    (e) => e.getBoundingClientRect().right > innerWidth + 1 && !scrolls(e.parentElement));
  const ink = (img) => {
    const canvas = document.createElement("canvas"), [w, h] = [img.naturalWidth, img.naturalHeight];
    [canvas.width, canvas.height] = [w, h];
    const context = canvas.getContext("2d");
    context.drawImage(img, 0, 0);
    const data = context.getImageData(0, 0, w, h).data;
    let dark = 0;
    for (let i = 0; i < data.length; i += 4) dark += data[i] + data[i + 1] + data[i + 2] < 600;
    return dark / (w * h);
  };
  document.documentElement.dataset.found = JSON.stringify({
    viewport: innerWidth, page: document.documentElement.scrollWidth,
    sticking: sticking.map((e) => e.tagName + "." + e.className),
    plots: [...document.querySelectorAll("img.plot")].map((e) => [e.alt, ink(e), e.getBoundingClientRect().width]),
  });
});</script>"""


def look(page: str, folder, *, width: int) -> tuple[dict, list[str]]:
    """Returns what the probe found in a window of that width, and the console's lines."""
    file = folder / "probed.html"
    file.write_text(page.replace("</body>", PROBE + "</body>"))
    line = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},844", "--enable-logging=stderr",
            f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=5000", "--dump-dom", file.as_uri()]  # fmt: skip
    result = subprocess.run(line, capture_output=True, text=True, timeout=120)
    found = re.search(r'data-found="([^"]*)"', result.stdout)
    assert found, result.stderr
    return json.loads(unescape(found[1])), [line for line in result.stderr.splitlines() if ":CONSOLE" in line]


@pytest.mark.parametrize("width", [390, 1280])
def test_the_report_in_a_browser(tmp_path, width):
    write_run(tmp_path)
    found, console = look(build_report(tmp_path).read_text(), tmp_path, width=width)
    assert console == []
    assert found["viewport"] == width and found["page"] <= width and found["sticking"] == []
    assert len(found["plots"]) >= 6
    for name, ink, shown in found["plots"]:
        assert 0.005 < ink < 0.9 and shown > 300, name


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_of_infer_in_a_browser(tmp_path, width):
    """A wide picture, a token longer than a line, an answer of many tokens."""
    tokens = ["word" * 60, "\n\n", *([" so", " $x_1$", "<b>"] * 200)]
    leaf = {
        "tokens": tokens, "entropies": [i % 7 / 3 for i in range(len(tokens))], "window_means": [0.5] * len(tokens),
        "marks": ["h w", "h", "", *[""] * (len(tokens) - 3)], "tau_high": 0.5, "finish_reason": "stop", "parent": -1,
        "branch_position": 0,
    }  # fmt: skip
    image = "data:image/png;base64," + base64.b64encode(png(3000, 200)).decode()
    questions = [{"question": "How " + "long" * 80 + "?", "images": [image], "answers": [leaf, leaf]}]
    found, console = look(answers_page("ARES: " + "folder" * 20, "note " * 40, questions), tmp_path, width=width)
    assert console == []
    assert found["viewport"] == width and found["page"] <= width and found["sticking"] == []
    assert len(found["plots"]) == 2 and all(0.005 < ink < 0.9 and shown > 300 for _, ink, shown in found["plots"])


def test_the_probe_sees_what_it_looks_for(tmp_path):
    blank = "data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/%3E"
    body = f"<p style='width:800px'>wide</p><img class=plot alt=blank src=\"{blank}\"><script>console.error('bad')</script>"
    page = f"<!doctype html><meta name=viewport content='width=device-width'><body>{body}</body>"
    found, console = look(page, tmp_path, width=390)
    assert found["page"] > 390 and "P." in found["sticking"] and len(console) == 1
    ((_, ink, _),) = found["plots"]
    assert not 0.005 < ink < 0.9
