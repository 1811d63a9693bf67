"""The pictures of the docs that show the program at work, made again from a finished `retro demo`.

    python benchmarks/pictures.py demo --page docs/page.png             # Chromium, chromedriver and selenium

page.png is the page of `retro serve` after it has continued a passage of a held-out document.
"""

from __future__ import annotations

import argparse
import io
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

PROMPT = """Rotates half the hidden dims of the input.

def apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1)

Applies Rotary Position Embedding to the query and key tensors.

Args:
    q (`torch.Tensor`): The query tensor."""
WIDTH, HEIGHT = 1100, 880  # pixels of the page
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path, help="the folder that `retro demo` wrote")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write the page of `retro serve` as .png")
    given = parser.parse_args()
    if given.page:
        photograph_page(given.demo, given.page)


if __name__ == "__main__":
    main()
