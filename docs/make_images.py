"""Writes the images of README.md: the terminal during `make demo`, and the top of its report.

Run `make images` after a change of what they show. It needs Chromium (Debian, Ubuntu: apt install chromium).
"""

import io
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pexpect
from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).resolve().parents[1]
IMAGES, RUN = ROOT / "docs" / "images", ROOT / "runs" / "demo"
COLUMNS, LIMIT_SECONDS = 112, 900
SHOWN = re.compile(r"step 1100/1200")  # the terminal is shown at this line of the log
MOVES = re.compile(r"\x1b\[\d*[A-HJKf]|\x1b\[\?\d+[hl]|\r\n")
CHROMIUM = ["chromium", "--headless", "--no-sandbox", "--hide-scrollbars", "--force-device-scale-factor=1.5"]


def record_terminal() -> str:
    """Runs `make demo` on a terminal of its own; returns what that shows late in the training."""
    child = pexpect.spawn(
        "make", ["demo"], cwd=ROOT, dimensions=(60, COLUMNS), encoding="utf-8", timeout=LIMIT_SECONDS
    )
    child.expect(SHOWN)
    text = child.before + child.after
    child.expect("step/s[^\r\n]*")  # the bar below the log
    text += child.before + child.after
    child.expect(pexpect.EOF)
    return text


def last_states(text: str) -> list[str]:
    """Returns the lines that the terminal finally shows: of each, the text after the last carriage return."""
    lines = [line.rstrip("\r").rsplit("\r", 1)[-1] for line in MOVES.sub("\n", text).split("\n")]
    return [line for line in lines if line.strip() and not line.startswith(("make", ".venv", "\t", "*"))]


def write_terminal(lines: list[str]) -> None:
    """Writes the lines as an SVG that looks like a terminal; log lines without the bars between them."""
    log = [line for line in lines[:-1] if re.match(r"(\x1b\[[\d;]*m)*\d\d:\d\d:\d\d ", line)]
    console = Console(record=True, width=COLUMNS, file=io.StringIO())
    for line in [*log[-14:], lines[-1]]:
        console.print(Text.from_ansi(line), overflow="fold", crop=False)
    console.save_svg(str(IMAGES / "terminal.svg"), title="make demo")


def write_report_image() -> None:
    """Writes the top of report.html as a PNG."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "report.png"
        size = ["--window-size=1100,1180", f"--screenshot={target}", f"--user-data-dir={folder}/profile"]
        subprocess.run([*CHROMIUM, *size, (RUN / "report.html").as_uri()], check=True, capture_output=True)
        shutil.move(target, IMAGES / "report.png")


if __name__ == "__main__":
    IMAGES.mkdir(exist_ok=True)
    shutil.rmtree(RUN, ignore_errors=True)
    write_terminal(last_states(record_terminal()))
    write_report_image()
