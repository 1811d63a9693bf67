"""The pictures of the docs that show the program at work, made again from a finished `retro demo`.

    python benchmarks/pictures.py demo --page docs/page.png             # Chromium, chromedriver and selenium
    python benchmarks/pictures.py demo --terminal docs/terminal.svg     # pip install rich; some 4 minutes on two cores

page.png is the page of `retro serve` after it has continued a passage of a held-out document. terminal.svg shows what
the commands print that build a datastore of the demo's documents, train a RETRO and sample from it.
"""

from __future__ import annotations

import argparse
import io
import os
import pty
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from PIL import Image

PROMPT = """Rotates half the hidden dims of the input.

def apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1)

Applies Rotary Position Embedding to the query and key tensors.

Args:
    q (`torch.Tensor`): The query tensor."""
COMMANDS = [
    "retro tokenizer tok docs.jsonl --vocab-size 8192",
    "retro build store docs.jsonl --tokenizer tok --decontaminate heldout.jsonl",
    "retro neighbors store --k 2",
    "retro train train_small store=store output=run",
    'retro generate run "$(cat prompt.txt)" --store store --max-new-tokens 80',
]
WIDTH, HEIGHT = 1100, 880  # pixels of the page
COLUMNS = 104  # characters of a line of the terminal
RETRO = [sys.executable, "-m", "retro.cli"]


def photograph_page(demo: Path, file: Path) -> None:
    """Serve the demo's model, let it write, and keep the page as a picture."""
    with served(demo) as url, chromium() as browser:
        browser.get(url)
        wait_for(lambda: browser.find_elements("css selector", "#store option"))
        browser.find_element("css selector", "#prompt").send_keys(PROMPT)
        browser.execute_script("document.querySelector('#prompt').rows = 8")
        tokens = browser.find_element("css selector", "#tokens")
        tokens.clear()
        tokens.send_keys("96")
        browser.find_element("css selector", "#write").click()
        wait_for(lambda: "tokens in" in browser.find_element("css selector", "#status").text)
        browser.execute_script("document.querySelector('#sources').scrollTop = 0; document.activeElement.blur()")
        picture = Image.open(io.BytesIO(browser.get_screenshot_as_png()))
        picture.convert("P", palette=Image.Palette.ADAPTIVE, colors=64).save(file, optimize=True)


@contextmanager
def served(demo: Path) -> Iterator[str]:
    """The address of a server of the demo's model."""
    command = [*RETRO, "serve", str(demo / "retro"), "--store", str(demo / "store"), "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield server.stdout.readline().split()[-1]
    finally:
        server.terminate()
        server.wait()


@contextmanager
def chromium():
    from selenium.webdriver import Chrome, ChromeOptions
    from selenium.webdriver.chrome.service import Service

    options = ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome")
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(argument)
    browser = Chrome(options, Service(shutil.which("chromedriver")))
    size = {"width": WIDTH, "height": HEIGHT, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        yield browser
    finally:
        browser.quit()


def wait_for(true, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            raise SystemExit(f"the page did not come about within {seconds:g} s")
        time.sleep(0.1)


def record_terminal(demo: Path, file: Path) -> None:
    """Run the commands over the demo's documents, and keep what they print as a picture."""
    from rich.console import Console
    from rich.text import Text

    console = Console(record=True, file=io.StringIO(), width=COLUMNS, force_terminal=True, color_system="truecolor")
    with tempfile.TemporaryDirectory() as folder:
        for name, source in (("docs", "train"), ("heldout", "valid")):
            shutil.copy(demo / f"{source}.jsonl", Path(folder) / f"{name}.jsonl")
        (Path(folder) / "prompt.txt").write_text(PROMPT + "\n")
        for command in COMMANDS:
            console.print(Text.assemble(("$ ", "bold green"), (command, "bold")))
            console.print(Text.from_ansi(printed(command, folder)))
    svg = console.export_svg(title="retro-lm")
    file.write_text(re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL), encoding="utf-8")  # no font is loaded


def printed(command: str, folder: str) -> str:
    """What a command prints on a terminal, without its progress bars."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    here, there = pty.openpty()
    with tempfile.TemporaryFile("w+") as errors:
        running = subprocess.Popen(
            command, shell=True, cwd=folder, env=os.environ | {"PATH": path}, stdout=there, stderr=errors
        )
        os.close(there)
        read = b""
        with suppress(OSError):  # the end of a terminal
            while block := os.read(here, 4096):
                read += block
        os.close(here)
        if running.wait():
            errors.seek(0)
            raise SystemExit(f"{command} failed:\n{errors.read()}")
    text = read.decode().replace("\r\n", "\n").strip("\n")
    return f"{text}\n" if text else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path, help="the folder that `retro demo` wrote")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write the page of `retro serve` as .png")
    parser.add_argument("--terminal", type=Path, metavar="FILE", help="write a terminal as .svg")
    given = parser.parse_args()
    if given.page:
        photograph_page(given.demo, given.page)
    if given.terminal:
        record_terminal(given.demo, given.terminal)


if __name__ == "__main__":
    main()
