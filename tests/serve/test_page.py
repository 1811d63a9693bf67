"""The page in a real headless Chromium; skipped where there is none (Debian: apt install chromium chromium-driver)."""

import shutil

import pytest

from tests.serve.conftest import SCRIPT, serving
from tests.stand_ins import words
from tests.waiting import wait_until

pytest.importorskip("selenium")
DRIVER, BROWSER = shutil.which("chromedriver"), shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(not (DRIVER and BROWSER), reason="Chromium and chromedriver are not installed")
PROMPT = words(20)


@pytest.fixture(scope="module")
def browser():
    from selenium.webdriver import Chrome, ChromeOptions
    from selenium.webdriver.chrome.service import Service

    options = ChromeOptions()
    options.binary_location = BROWSER
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1300,1000"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = Chrome(options, Service(DRIVER))
    yield browser
    browser.quit()


class Page:
    """The page as a person uses it."""

    def __init__(self, browser, url):
        self.browser = browser
        browser.get_log("browser")
        browser.get(url)

    def __call__(self, css):
        return self.browser.find_element("css selector", css)

    def all(self, css):
        return self.browser.find_elements("css selector", css)

    def type(self, css, text):
        self(css).clear()
        self(css).send_keys(str(text))

    def text(self):
        """What was written, without the prompt and the chunks' numbers."""
        script = (
            "const copy = document.querySelector('#text').cloneNode(true);"
            "for (const part of copy.querySelectorAll('.number, .prompt')) part.remove(); return copy.textContent"
        )
        return self.browser.execute_script(script)

    def write(self, **fields):
        """Fill in, click, and wait for the end."""
        for name, value in fields.items():
            self.type(f"#{name}", value)
        self("#write").click()
        self.wait()

    def wait(self):
        wait_until(lambda: self("#write").is_enabled() and self("#status").text.split("; ")[-1] not in ("", "waiting"))

    def problems(self):
        """What the browser complains of: scripts that failed, what the policy refused."""
        return [entry["message"] for entry in self.browser.get_log("browser") if entry["level"] == "SEVERE"]


@pytest.fixture
def page(browser, make_engine):
    with serving(make_engine(max_new_tokens=15_000)) as url:
        page = Page(browser, url)
        wait_until(lambda: len(page.all("#store option")) == 3)
        yield page


def test_a_person_writes_reads_sources_and_chooses(page, make_engine):
    from tests.serve.conftest import ask_all

    ways = [{"store": "main", "align": "end"}, {"retrieval": False}]
    ways += [{"store": "hostile", "num_neighbors": 3, "align": "end"}]  # the page always takes the end
    asked = [
        ("/v1/completions", {"prompt": PROMPT, "max_tokens": 40, "temperature": 0, "retro": retro}) for retro in ways
    ]
    on, off, other = (response.json() for response in ask_all(make_engine(), asked))
    page.write(prompt=PROMPT, tokens=40)
    assert page.text() == on["choices"][0]["text"] and page("#text .prompt").text == PROMPT
    cards = [n for chunk in on["retro"]["sources"] for n in chunk["neighbors"]]
    assert [card.text for card in page.all("#sources h4")] == [neighbor["title"] for neighbor in cards]
    assert all(f"-squared L2 {n['score']:.3f}" in card.text for n, card in zip(cards, page.all(".where"), strict=True))
    marked = [mark.text for mark in page.all("#sources mark")]
    assert marked == [n["copied"]["text"].strip() for n in cards if n["copied"] and n["copied"]["num_tokens"] >= 3]
    assert "40 tokens in" in page("#status").text

    page("#retrieval").click()
    assert not page("#store").is_enabled()
    page.write()
    assert page.text() == off["choices"][0]["text"] and not page.all("#sources article")

    page("#retrieval").click()
    page("#store option[value=hostile]").click()
    page.write(neighbors=3)
    assert page.text() == other["choices"][0]["text"] and len(page.all(".reading article")) > 3
    assert SCRIPT in page("#sources h4").text and page.browser.title == "tiny · retro serve"
    assert not page.all("#text script, #sources script, #sources img, #sources a") and page.problems() == []


def test_text_and_sources_come_while_it_is_being_written(page, hold):
    hold(40)
    page.type("#prompt", PROMPT)
    page.type("#tokens", 15_000)
    page("#write").click()
    wait_until(lambda: page.all("#sources article"))
    wait_until(page.text)
    early = page.text()
    hold(80)
    wait_until(lambda: len(page.text()) > len(early))
    assert not page("#write").is_enabled() and page("#status").text.startswith("writing")
    page("#stop").click()
    wait_until(lambda: page("#status").text == "stopped")
    assert page("#write").is_enabled() and not page("#error").is_displayed()
    page.write(tokens=5)
    assert page.all("#sources article") and page.problems() == []


def test_a_chunk_that_is_clicked_shows_what_it_read(page):
    page.write(prompt=PROMPT, tokens=30)
    chunk = page.all("#text .reads")[1]
    chunk.click()
    chosen = page.all(".reading.chosen")
    assert len(chosen) == 1 and chosen[0].get_attribute("data-chunk") == chunk.get_attribute("data-chunk")


def test_mistakes_are_said_on_the_page(page):
    page.browser.execute_script("document.querySelector('#form').noValidate = true")
    page.type("#prompt", PROMPT)
    page.type("#tokens", 16_000)
    page("#write").click()
    wait_until(lambda: page("#error").is_displayed())
    assert "max_tokens is 16000; at most 15000" in page("#error").text and page("#write").is_enabled()
    page.write(tokens=5)
    assert not page("#error").is_displayed()


def test_a_token_is_asked_for(browser, make_engine):
    with serving(make_engine(), api_key="s3cret-token") as url:
        page = Page(browser, url)
        wait_until(lambda: page("#error").is_displayed())
        assert "bearer token" in page("#error").text
        page.type("#key", "s3cret-token\t")
        wait_until(lambda: len(page.all("#store option")) == 3)
        page.write(prompt=PROMPT, tokens=5)
        assert page.text()
