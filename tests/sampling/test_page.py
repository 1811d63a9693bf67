"""The page of texts and sources: what it shows, how it links, and that nothing in a document can act in it."""

import base64
import hashlib
import re
from html.parser import HTMLParser

import pytest

from retro.retrieval import Source
from retro.sampling import Attribution, CopiedRun, ReadingChunk, ReadNeighbor, html_fragment, html_page

HOSTILE = [
    "<script>alert(1)</script>",
    "</script><script>alert(2)</script>",
    "<img src=x onerror=alert(3)>",
    '" onmouseover="alert(4)" x=\'',
    "' onfocus='alert(5)",
    "--><!-- ]]> </style></div></section>",
    "{{ 7 * 7 }}{% include 'page.css' %}",
    "&lt;script&gt; &#60;b&#62; &amp;",
    "\u202egpj.exe\u2066 \x00\x1b[2J\r\x9b",
]
VOID = {"meta", "img", "link", "br", "input", "base"}


class Element:
    def __init__(self, tag: str, attributes: dict, parent=None):
        self.tag, self.attributes, self.parent, self.children = tag, attributes, parent, []

    @property
    def text(self) -> str:
        return "".join(child if isinstance(child, str) else child.text for child in self.children)

    def all(self, tag: str | None = None, name: str | None = None) -> list["Element"]:
        """Elements below this one, in order, of a tag and a class."""
        found = []
        for child in self.children:
            if isinstance(child, Element):
                if tag in (None, child.tag) and (name is None or name in child.attributes.get("class", "").split()):
                    found.append(child)
                found += child.all(tag, name)
        return found


class Tree(HTMLParser):
    """The elements of a page; a tag that is not closed in its turn is an error."""

    def __init__(self, html: str):
        super().__init__(convert_charrefs=True)
        self.root = self.here = Element("", {})
        self.feed(html)
        self.close()
        assert self.here is self.root

    def handle_starttag(self, tag, attributes):
        assert len(dict(attributes)) == len(attributes), "an attribute twice"
        element = Element(tag, dict(attributes), self.here)
        self.here.children.append(element)
        if tag not in VOID:
            self.here = element

    def handle_endtag(self, tag):
        assert tag == self.here.tag
        self.here = self.here.parent

    def handle_data(self, data):
        self.here.children.append(data)

    def handle_comment(self, data):
        raise AssertionError("a comment")


def tree(html: str) -> Element:
    return Tree(html).root


def neighbor(tokens, copied=None, continuation_start=4, **source) -> ReadNeighbor:
    known = Source(**{"document_id": "d", "title": "a title", "source": "", "position": 2, **source})
    return ReadNeighbor(7, -0.5, known, tuple(tokens), continuation_start, copied, "-squared L2")


def attribution(tokens, num_prompt_tokens, *neighbors, gains=None) -> Attribution:
    """A text of two chunks of half its tokens, the second of which could read the neighbors."""
    half = len(tokens) // 2
    chunks = tuple(
        ReadingChunk(number, start, start + half, min(max(num_prompt_tokens - start, 0), half), read)
        for number, start, read in ((0, 0, ()), (1, half, tuple(neighbors)))
    )
    return Attribution(tuple(range(len(tokens))), tuple(tokens), num_prompt_tokens, half, chunks, True, gains)


WORDS = [f" w{i}" for i in range(16)]
FIRST = neighbor(WORDS[6:14], CopiedRun(9, 3, 4, " w9 w10 w11 w12"), title="first", date="2020-02-02")
SECOND = neighbor(WORDS[10:16], CopiedRun(10, 0, 6, ""), title="second", source="https://example.org/a?b=1&c=2")
THIRD = neighbor([" x", WORDS[14], WORDS[15]], CopiedRun(14, 1, 2, ""), title="third")  # too short a run to be shown
TEXT = attribution(WORDS, 9, FIRST, SECOND, THIRD)


def test_text_stands_left_and_neighbors_right():
    first, second = tree(html_page([TEXT])).all("section", "chunk")
    bodies = [section.all("div", "body")[0] for section in (first, second)]
    assert bodies[0].text == "".join(WORDS[:8])
    assert [part.text for part in bodies[0].all("span", "prompt")] == ["".join(WORDS[:8])]
    assert [part.text for part in bodies[1].all("span", "prompt")] == [WORDS[8]]
    assert len(bodies[1].all("span", "seam")) == 1, "the continuation starts at one place"
    assert re.sub(r"[▸\d]*$", "", bodies[1].text.replace("▸", "")).startswith(" w8 w9")
    assert "prompt, then generated" in second.all("h3")[0].text and "reads nothing" in first.all("p")[0].text
    shown = second.all("li")
    assert [item.all("bdi", "where")[0].text for item in shown] == ["first, chunk 3, 2020-02-02", *(
        f"{title}, chunk 3" for title in ("second", "third"))]  # fmt: skip
    assert [item.all("div", "passage")[0].text for item in shown] == [n.text for n in (FIRST, SECOND, THIRD)]
    assert "".join(part.text for part in shown[0].all("span", "follows")) == "".join(FIRST.tokens[4:])
    assert all("-squared L2 -0.500" in item.text for item in shown)


def test_copied_runs_are_marked_in_both_and_linked():
    section = tree(html_page([TEXT])).all("section", "chunk")[1]
    body, items = section.all("div", "body")[0], section.all("li")
    left = [(mark.attributes["data-runs"].split(), mark.text) for mark in body.all("mark")]
    one, two = items[0].attributes["id"], items[1].attributes["id"]
    assert left == [([one], " w9"), ([one, two], " w10 w11 w12"), ([two], " w13 w14 w15")]
    right = [[(mark.attributes["data-runs"], mark.text) for mark in item.all("mark")] for item in items]
    joined = ["".join(text for _, text in marks) for marks in right]
    assert joined == [" w9 w10 w11 w12", " w10 w11 w12 w13 w14 w15", ""]
    assert {name for name, _ in right[0]} == {one} and {name for name, _ in right[1]} == {two}
    colors = lambda element: set(re.findall(r"color\d", element.attributes["class"]))  # noqa: E731
    assert colors(body.all("mark")[0]) == colors(items[0].all("mark")[0]) != colors(items[1].all("mark")[0])
    assert [link.attributes["href"] for link in body.all("a", "ref")] == [f"#{one}", f"#{two}"]
    assert [link.text for item in items for link in item.all("a", "copied")] == ["4 tokens copied", "6 tokens copied"]


def test_every_link_inside_has_its_place():
    page = tree(html_page([TEXT, TEXT]))
    ids = [element.attributes["id"] for element in page.all() if "id" in element.attributes]
    assert len(ids) == len(set(ids))
    links = [link.attributes["href"] for link in page.all("a")]
    assert {link[1:] for link in links if link.startswith("#")} <= set(ids)
    assert len(page.all("h2")) == 2 and not tree(html_page([TEXT])).all("h2")
    for label in (e.attributes["aria-labelledby"] for e in page.all() if "aria-labelledby" in e.attributes):
        assert label in ids


def test_gains_shade_their_tokens():
    gains = [None, *[0.0] * 8, 0.1, 0.5, 1.5, -3.0, 9.0, -0.3, 0.0]
    page = tree(html_page([attribution(WORDS, 9, FIRST, gains=gains)]))
    body = page.all("div", "body")[1]
    shades = {span.text: (span.attributes.get("class"), span.attributes["title"]) for span in body.all("span")
              if "bits" in span.attributes.get("title", "")}  # fmt: skip
    assert shades[" w10"] == ("gain1", "+0.50 bits") and shades[" w11"] == ("gain2", "+1.50 bits")
    assert shades[" w12"] == ("loss3", "-3.00 bits") and shades[" w13"] == ("gain4", "+9.00 bits")
    assert shades[" w14"] == ("loss1", "-0.30 bits") and shades[" w9"] == (None, "+0.10 bits")
    assert "gain +7.8 bits" in page.all("h3")[1].text and "in bits" in page.all("p", "legend")[0].text
    assert "in bits" not in tree(html_page([TEXT])).all("p", "legend")[0].text


def policy(page: Element) -> dict[str, str]:
    (meta,) = (m for m in page.all("meta") if m.attributes.get("http-equiv") == "Content-Security-Policy")
    return dict(part.strip().split(" ", 1) for part in meta.attributes["content"].split(";"))


def test_the_page_needs_nothing_else_and_lets_nothing_else_act():
    page = tree(html_page([TEXT], {"model": "run"}))
    (style,), (script,) = page.all("style"), page.all("script")
    digest = lambda e: f"'sha256-{base64.b64encode(hashlib.sha256(e.text.encode()).digest()).decode()}'"  # noqa: E731
    assert policy(page) == {
        "default-src": "'none'",
        "style-src": digest(style),
        "script-src": digest(script),
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    assert not page.all("link") and not page.all("img") and not page.all("iframe")
    assert not re.search(r"url\(|@import|https?:|innerHTML|eval", style.text + script.text)
    assert not [e for e in page.all() if any(name in ("style", "src", "srcset") or name.startswith("on") for name in e.attributes)]  # noqa: E501  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_stays_text(text):
    """In documents, titles, ids, sources, dates, prompts, generated tokens and the heading."""
    tokens = [*WORDS[:8], text, *WORDS[9:15], text]
    fields = {name: text for name in ("document_id", "title", "source", "date")}
    hostile = neighbor([text, *WORDS[9:12], text], CopiedRun(9, 1, 3, ""), **fields)
    untitled = neighbor([text], None, **{**fields, "title": ""})
    gains = [None, *[0.3] * 15]
    for found in (attribution(tokens, 9, hostile, untitled), attribution(tokens, 3, hostile, gains=gains)):
        page = tree(html_page([found], {text: text}))
        plain = tree(html_page([TEXT], {"a": "b"}))
        assert {e.tag for e in page.all()} <= {e.tag for e in plain.all()}
        assert len(page.all("script")) == len(page.all("style")) == 1
        assert {name for e in page.all() for name in e.attributes} <= {
            name for e in plain.all() for name in e.attributes
        } | {"title"}
        assert all(link.attributes["href"].startswith("#") for link in page.all("a"))
        shown = page.all("div", "body")[1].text + page.all("div", "passage")[0].text
        if text.isprintable():
            assert shown.count(text) == 4
        else:
            assert "[U+202E]gpj.exe[U+2066]" in shown and "␀␛[2J␍[U+009B]" in shown
        assert not set("\x00\x1b\r\x9b\u202e\u2066") & set(page.text)


@pytest.mark.parametrize(
    ("source", "is_link"),
    [
        ("https://example.org/a?b=<c>&d='\"", True),
        ("http://example.org", True),
        ("javascript:alert(1)", False),
        ("JaVaScRiPt:alert(1)//https://example.org", False),
        ("java\nscript:alert(1)", False),
        ("\x01javascript:alert(1)", False),
        ("data:text/html,<script>alert(1)</script>", False),
        ("vbscript:x", False),
        ("//example.org", False),
        ("https:alert(1)", False),
        ("https://exa\u202emple.org", False),
        ("http://[", False),
        ("file:///etc/passwd", False),
        ("corpus.jsonl", False),
    ],
)
def test_only_web_addresses_are_links(source, is_link):
    page = tree(html_page([attribution(WORDS, 9, neighbor(WORDS[:4], source=source))]))
    outside = [link for link in page.all("a") if not link.attributes["href"].startswith("#")]
    assert [link.attributes["href"] for link in outside] == [source] * is_link
    assert all("noopener" in link.attributes["rel"] and "noreferrer" in link.attributes["rel"] for link in outside)
    assert len([e for e in page.all() if "address" in e.attributes.get("class", "").split()]) == 1


def test_a_fragment_is_the_part_of_the_page():
    fragment = html_fragment(TEXT, "t1")
    assert "".join(fragment.split()) in "".join(html_page([TEXT]).split())
    assert not tree(fragment).all("script") and 'id="a9c2n1"' in html_fragment(TEXT, "a9")
