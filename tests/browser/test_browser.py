"""What people see in a browser: the report, and the dashboard. `make browser` runs these; they need Chromium.

The screenshots are in artifacts/browser/: look at them.
"""

import contextlib
import re
import shutil
import signal
import urllib.request
from pathlib import Path

import pytest
from commands import BIN, ROOT, SHORT, find_free_port, until
from playwright.sync_api import sync_playwright
from run_folders import rows

pytestmark = [pytest.mark.browser, pytest.mark.timeout(900)]
SCREENSHOTS = ROOT / "artifacts" / "browser"
LAB = "name: lab\nmachines:\n  - {name: alder, address: 10.77.0.1}\n  - {name: birch, address: 10.77.0.2}\n"
FLAGS = [*SHORT, "--max-steps", 400, "--eval-fraction", "0.02", "--eval-every", 100, "--sample-every", 100]
FLAGS += ["--checkpoint-every", 50, "--write-report", "true", "--device", "cpu", "--timeout-seconds", 10]
SECTIONS = ("Plots", "Machines", "Samples", "Events", "Checkpoints", "Configuration")


@pytest.fixture(scope="module")
def chromium():
    path = shutil.which("chromium") or shutil.which("google-chrome")
    assert path, "these tests need Chromium: apt install chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.mark.netns
def test_the_report_of_two_machines_of_which_one_was_lost_and_came_back(hosts, start, tmp_path, chromium):
    (tmp_path / "cluster.yaml").write_text(LAB)
    machines = hosts(2)

    def launch(n: int, name: str):
        words = [BIN / "p2p-llm-forge", "--cluster", tmp_path / "cluster.yaml", "--max-restarts", 20, *FLAGS]
        return start([*words, "--output-dir", tmp_path / name], prefix=[*machines.on(n), "env", "OMP_NUM_THREADS=1"])

    running = [launch(1, "alder"), launch(2, "birch")]
    until(lambda: (tmp_path / "alder" / "checkpoints" / "step-00000150").exists(), 240, "a checkpoint")
    running[1].kill()
    until(lambda: rows(tmp_path / "alder", "message"), 120, "the loss of birch is noticed")
    running[1] = launch(2, "birch")
    assert [each.finish(400).code for each in running] == [0, 0], running[0].log.read_text()
    check_page(chromium, tmp_path / "alder" / "report.html")
    events = [row["event"] for row in rows(tmp_path / "alder", "event")]
    assert "peer_lost" in events and "resume" in events


def check_page(chromium, page: Path) -> None:
    """Opens a report at two widths and in two color schemes, and takes the screenshots."""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    for name, width in (("desktop", 1280), ("phone", 390)):
        for scheme in ("light", "dark"):
            context = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
            tab, messages, requests = context.new_page(), [], []
            tab.on("console", lambda message, messages=messages: messages.append(message.text))
            tab.on("pageerror", lambda error, messages=messages: messages.append(str(error)))
            tab.on("request", lambda request, requests=requests: requests.append(request.url))
            tab.goto(page.as_uri())
            tab.screenshot(path=SCREENSHOTS / f"report-{name}-{scheme}.png", full_page=True)
            assert messages == []
            assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
            headings = tab.locator("h2").all_inner_texts()
            assert [each for each in SECTIONS if each not in headings] == []
            assert tab.evaluate("document.documentElement.scrollWidth") <= width, "nothing is cut off at the right"
            sizes = tab.evaluate(
                "[...document.querySelectorAll('svg text')].map(t => t.getBoundingClientRect().height)"
            )
            assert min(size for size in sizes if size) >= 9, "pixels: legible on a phone"
            context.close()


def test_the_dashboard_shows_the_current_step_of_a_run_that_goes_on(start, tmp_path, chromium):
    variables = {"TRACKIO_DIR": str(tmp_path / "trackio"), "GRADIO_SERVER_PORT": str(find_free_port())}
    words = [BIN / "python", "scripts/train.py", *FLAGS, "--max-steps", 100_000, "--report-to", "trackio"]
    running = start([*words, "--output-dir", tmp_path / "run"], variables=variables)
    shown = start([BIN / "trackio", "show", "--project", "p2p-llm-forge"], variables=variables)
    address = until(lambda: re.search(r"http://127\.0\.0\.1:\d+", shown.log.read_text()), 120, "the dashboard")[0]
    metrics = tmp_path / "run" / "metrics.jsonl"
    until(lambda: metrics.exists() and rows(tmp_path / "run", "text"), 240, "a sample")
    tab = chromium.new_context(viewport={"width": 1400, "height": 1100}).new_page()
    requests = []
    tab.on("request", lambda request: requests.append(request.url))
    tab.goto(address)

    def step_shown() -> int:
        """Returns the last step of the run in the dashboard's table; the plots are pictures."""
        for name in ("Metrics", "Runs"):
            tab.get_by_text(name, exact=True).last.click()
        tab.wait_for_timeout(2000)
        numbers = re.findall(r"\d+", tab.inner_text("body"))
        return int(numbers[-1])

    tab.wait_for_timeout(3000)
    before = until(lambda: step_shown() >= 100 and step_shown(), 60, "the dashboard shows step 100")
    until(lambda: rows(tmp_path / "run", "loss")[-1]["step"] > before + 100, 240, "more steps")
    until(lambda: step_shown() > before, 60, "the dashboard follows")
    tab.get_by_text("Alerts & Reports").click()
    tab.wait_for_timeout(2000)
    sample = rows(tmp_path / "run", "text")[0]["text"]
    assert sample.split()[1] in tab.inner_text("body"), "the sample"
    tab.get_by_text("Metrics", exact=True).last.click()
    tab.wait_for_timeout(2000)
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    tab.screenshot(path=SCREENSHOTS / "dashboard.png", full_page=True)
    names = tab.inner_text("body")
    assert [name for name in ("loss", "eval_loss", "tokens_per_second", "num_machines") if name not in names] == []
    assert {re.match(r"https?://[^/]+", url)[0] for url in requests if url.startswith("http")} == {address}
    with contextlib.suppress(OSError):
        urllib.request.urlopen(address, timeout=2)
    for each in (running, shown):
        each.process.send_signal(signal.SIGTERM)
    running.finish(60)
