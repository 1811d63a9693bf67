"""`retro generate`: prompts from everywhere, text streamed, as JSON and as a page; hostile prompts, stores, options."""

import io
import json

import pytest

from retro.cli import main
from retro.text.documents import Document
from tests.sampling.test_page import tree
from tests.stand_ins import write_jsonl

CHUNK_LEN = 16
PROMPT = "the quick  brown fox 1 jumps\n\tover it and the quick  brown fox 2 jumps over"
TAGS = "<script>document.title='x'</script> the quick  brown fox 3 jumps <img src=x onerror=alert(1)> over it"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folders: a tiny random model, its tokenizer, a store searched by words, and one of a single document."""
    import torch

    from retro import RetroConfig, RetroForCausalLM
    from retro.text.tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("generate")
    texts = [f"the quick  brown fox {i} jumps\n\tover it\n" * 4 for i in range(20)] + [TAGS] * 2
    records = [{"id": f"d{i}", "title": f"title {i} <b>", "source": "javascript:alert(1)", "text": text}
               for i, text in enumerate(texts)]  # fmt: skip
    tokenizer = train_tokenizer(folder / "tok", [Document(id="d", text=text) for text in texts[:20]], vocab_size=300)
    torch.manual_seed(1)
    config = RetroConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        chunk_len=CHUNK_LEN,
        retrieved_len=2 * CHUNK_LEN,
        cca_layers=[2],
        max_position_embeddings=256,
        initializer_range=0.2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    RetroForCausalLM(config).save_pretrained(folder / "run")
    tokenizer.save_pretrained(folder / "run")
    for name, documents in (
        ("store", records),
        ("single", [{"id": "only", "text": "brown fox " + "xyzzy plugh " * 9}]),
    ):
        inputs = write_jsonl(folder / f"{name}.jsonl", documents)
        argv = ["build", str(folder / name), inputs, "--tokenizer", str(folder / "tok"), "--embedder", "none"]
        assert main([*argv, "--index", "bm25", "--chunk-len", str(CHUNK_LEN), "--min-chunk-len", "1"]) == 0
    return folder


@pytest.fixture
def generate(made, tmp_path, capsys):
    """generate(*argv, store=...): the values written as JSON, what was printed and the page."""
    capsys.readouterr()

    def run(*argv, store="store"):
        retrieval = [] if store is None else ["--store", str(made / store)]
        files = ["--json", str(tmp_path / "out.json"), "--html", str(tmp_path / "out.html")]
        code = main(["generate", str(made / "run"), *argv, *retrieval, *files, "--max-new-tokens", "40"])
        printed = capsys.readouterr()
        assert code == 0, printed.err
        return json.loads((tmp_path / "out.json").read_text()), printed.out, (tmp_path / "out.html").read_text()

    return run


@pytest.fixture
def refused(made, capsys):
    """refused(*argv): the one line that is printed."""

    def run(*argv):
        argv = [str(argument).format(made=made) for argument in argv]
        assert main(["generate", str(made / "run"), *argv]) == 2
        printed = capsys.readouterr()
        (line,) = (line for line in printed.err.splitlines() if line.startswith("retro: "))
        assert line.startswith("retro: error: ") and "sources" not in printed.out
        return line

    return run


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Writes(io.StringIO):
    """What each call of write() was given."""

    def __init__(self):
        super().__init__()
        self.parts: list[str] = []

    def write(self, text):
        self.parts.append(text)
        return super().write(text)


def test_one_prompt_streams_and_is_told_with_its_sources(generate):
    result, printed, page = generate(PROMPT)
    (text,) = result["texts"]
    assert text["prompt"] == PROMPT and printed.startswith(PROMPT)
    assert "sources: what each chunk could read" in printed
    read = [neighbor for chunk in text["chunks"] for neighbor in chunk["neighbors"]]
    assert read and all(neighbor["title"] in printed for neighbor in read)
    assert result["num_neighbors"] == 2 and result["store"].endswith("store") and result["store_fingerprint"]
    assert len(tree(page).all("li")) == len(read)


def test_the_text_comes_as_it_is_written(made, monkeypatch):
    out = Writes()
    monkeypatch.setattr("sys.stdout", out)
    argv = ["generate", str(made / "run"), "the", "--store", str(made / "store"), "--max-new-tokens", "30"]
    assert main(argv) == 0
    assert out.parts[0] == "the" and len([part for part in out.parts[1:] if part.strip()]) > 10


@pytest.mark.parametrize("no_color", ["", "1"])
def test_color_on_a_terminal_only(made, monkeypatch, no_color):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", no_color)
    out = Terminal()
    monkeypatch.setattr("sys.stdout", out)
    assert main(["generate", str(made / "run"), "the", "--no-retrieval", "--max-new-tokens", "3"]) == 0
    assert out.getvalue().startswith("the" if no_color else "\x1b[2mthe\x1b[0m")


def test_several_prompts_are_all_in_json_and_on_the_page(generate, made):
    """A batch of ragged rows; each prompt's text is what it is alone."""
    result, printed, page = generate("the", PROMPT, "fox 3", "--batch-size", "2")
    assert [text["prompt"] for text in result["texts"]] == ["the", PROMPT, "fox 3"]
    assert all(f"== text {number} of 3" in printed for number in (1, 2, 3))
    assert all(text["text"] in printed for text in result["texts"] if text["text"].isprintable())
    assert len(tree(page).all("h2")) == 3
    for text in result["texts"]:
        assert generate(text["prompt"])[0]["texts"] == [text]


def test_prompts_from_files_and_standard_input(generate, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("the\n\nfox 3\n", encoding="utf-8")
    (tmp_path / "a.jsonl").write_text('{"prompt": "the\\nfox"}\n{"prompt": "über"}\n', encoding="utf-8")
    prompts = lambda *argv: [text["prompt"] for text in generate(*argv)[0]["texts"]]  # noqa: E731
    assert prompts("--prompt-file", str(tmp_path / "a.txt")) == ["the", "fox 3"]
    assert prompts("--prompt-file", str(tmp_path / "a.jsonl")) == ["the\nfox", "über"]
    monkeypatch.setattr("sys.stdin", io.StringIO("the quick\nbrown\n"))
    assert prompts() == ["the quick\nbrown"]
    monkeypatch.setattr("sys.stdin", io.StringIO("fox"))
    assert prompts("the", "-") == ["the", "fox"]


def test_gains_are_in_json_terminal_and_page(generate):
    result, printed, page = generate(PROMPT, "--gains")
    text = result["texts"][0]
    assert len(text["gains"]) == len(text["tokens"]) and any(text["gains"][CHUNK_LEN:])
    assert f"gain {text['chunks'][1]['gain']:+.1f} bits" in printed and "in bits" in page
    assert generate(PROMPT)[0]["texts"][0]["gains"] is None


def test_sampling_options_reach_generate(generate):
    sampled = lambda *argv: [text["text"] for text in generate(PROMPT, *argv)[0]["texts"]]  # noqa: E731
    draw = ["--do-sample", "--temperature", "1.5", "--top-p", "0.95", "--top-k", "30"]
    greedy = sampled()
    first = sampled(*draw, "--seed", "1", "--num-return-sequences", "3")
    assert len(set(first)) == 3 and greedy[0] not in first
    assert first == sampled(*draw, "--seed", "1", "--num-return-sequences", "3")
    assert first != sampled(*draw, "--seed", "2", "--num-return-sequences", "3")
    assert greedy == sampled("--do-sample", "--top-k", "1")
    assert len(sampled("--num-beams", "3", "--num-return-sequences", "2")) == 2
    assert sampled("--repetition-penalty", "5.0") != greedy


def test_a_text_ends_after_a_stop_string(generate):
    text = generate(PROMPT)[0]["texts"][0]
    written = text["tokens"][text["num_prompt_tokens"] :]
    stop = next(token for token in written[8:] if token.strip().isalnum())
    stopped = generate(PROMPT, "--stop", "never said", stop)[0]["texts"][0]["text"]
    assert stopped.endswith(stop) and text["text"].startswith(stopped) and len(stopped) < len(text["text"])


def test_lookahead_reads_by_what_stands_before_the_end(generate):
    ahead = generate(PROMPT, "--lookahead", "4")[0]["texts"][0]
    at_the_end = generate(PROMPT)[0]["texts"][0]
    read = lambda text: [[found["row"] for found in chunk["neighbors"]] for chunk in text["chunks"]]  # noqa: E731
    num_whole = ahead["num_prompt_tokens"] // CHUNK_LEN + 1
    assert read(ahead)[:num_whole] == read(at_the_end)[:num_whole] and read(ahead) != read(at_the_end)


def test_without_retrieval(generate):
    result, printed, page = generate(PROMPT, "--no-retrieval", store=None)
    assert "retrieval is off" in printed and "retrieval is off" in page
    assert not result["texts"][0]["retrieved"] and "store" not in result
    assert result["texts"][0]["text"] != generate(PROMPT)[0]["texts"][0]["text"]


REFUSED = {
    "no store": (["x"], "--store is missing"),
    "a store beside no retrieval": (["x", "--no-retrieval", "--store", "{made}/store"], "--store means nothing"),
    "k beside no retrieval": (["x", "--no-retrieval", "--k", "1"], "--k means nothing"),
    "an index beside no retrieval": (["x", "--no-retrieval", "--index", "exact"], "--index means nothing"),
    "lookahead beside no retrieval": (["x", "--no-retrieval", "--lookahead", "0"], "--lookahead means nothing"),
    "a lookahead of a chunk": ([PROMPT, "--store", "{made}/store", "--lookahead", "16"], "lookahead is 16"),
    "gains beside no retrieval": (["x", "--no-retrieval", "--gains"], "--gains means nothing"),
    "temperature": (["x", "--no-retrieval", "--temperature", "1"], "temperature needs do_sample"),
    "top-p": (["x", "--no-retrieval", "--top-p", "1"], "top_p needs do_sample"),
    "top-k": (["x", "--no-retrieval", "--top-k", "1"], "top_k needs do_sample"),
    "seed": (["x", "--no-retrieval", "--seed", "0"], "seed needs do_sample"),
    "several greedy texts": (["x", "--no-retrieval", "--num-return-sequences", "2"], "needs do_sample, or as many"),
    "more texts than beams": (
        ["x", "--no-retrieval", "--num-return-sequences", "3", "--num-beams", "2"],
        "needs do_sample, or as many",
    ),
    "temperature 0": (["x", "--no-retrieval", "--do-sample", "--temperature", "0"], "temperature"),
    "no new tokens": (["x", "--no-retrieval", "--max-new-tokens", "0"], "max_new_tokens"),
    "an empty prompt": (["", "--no-retrieval"], "the prompt has no tokens"),
    "one empty prompt of two": (["x", "", "--no-retrieval"], "prompt 2 has no tokens"),
    "a prompt of bytes": (["x\udcff", "--no-retrieval"], "is no UTF-8 text"),
    "a prompt of 10,000 tokens": (["fox " * 10_000, "--store", "{made}/store"], "the 256 positions"),
    "a text beyond the positions": (["x", "--no-retrieval", "--max-new-tokens", "9999"], "at most 254 new tokens"),
    "two sources of prompts": (["x", "--prompt-file", "a.txt", "--no-retrieval"], "--prompt-file is given beside"),
    "a file that is not there": (["--prompt-file", "{made}/no.txt", "--no-retrieval"], "no.txt"),
    "a file of another kind": (["--prompt-file", "a.csv", "--no-retrieval"], "neither .txt nor .jsonl"),
    "standard input twice": (["-", "-", "--no-retrieval"], "- is given twice"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_in_one_line(case, refused):
    argv, words = REFUSED[case]
    assert words in refused(*argv)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"\n  \n", "holds no prompt"),
        ("a.txt", b"\xff\xfe", "is no UTF-8 text"),
        ("a.jsonl", b'{"prompt": "x"}\n{"prompt":', "line 2: no JSON"),
        ("a.jsonl", b'\n{"text": "x"}', 'line 2: no text in "prompt"'),
        ("a.jsonl", b'{"prompt": ""}', 'line 1: no text in "prompt"'),
        ("a.jsonl", b'["x"]', 'line 1: no text in "prompt"'),
        ("a.jsonl", b'{"prompt": "\\ud800"}', "the prompt is no UTF-8 text"),
    ],
)
def test_prompt_files_that_hold_no_prompts(name, content, words, tmp_path, refused):
    (tmp_path / name).write_bytes(content)
    assert words in refused("--prompt-file", tmp_path / name, "--no-retrieval")


def test_no_prompt(refused, monkeypatch):
    monkeypatch.setattr("sys.stdin", Terminal("x"))
    assert "no prompt is given; give PROMPT" in refused("--no-retrieval")
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    assert "standard input is empty" in refused("--no-retrieval")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff"), encoding="utf-8"))
    assert "standard input is no UTF-8" in refused("--no-retrieval")


def test_a_prompt_of_one_token(generate):
    text = generate("t")[0]["texts"][0]
    assert text["num_prompt_tokens"] <= 2 and len(text["tokens"]) > 2


def test_a_character_cut_at_a_chunk_edge_stays_whole(generate):
    """The fox is one token a byte; some prompt of growing length puts the edge inside it."""
    cut = []
    for length in range(4, 16):
        prompt = "z" * length + "🦊 over it"
        result, printed, page = generate(prompt)
        text = result["texts"][0]
        if text["tokens"][CHUNK_LEN - 1] == "" and text["chunks"][0]["text"] == "z" * length:
            cut.append(length)
        assert text["prompt"] == prompt and printed.startswith(prompt)
        chunks = [chunk["text"] for chunk in text["chunks"] if chunk["origin"] == "prompt"]
        assert not any("\ufffd" in chunk for chunk in chunks)
        assert "".join(body.text for body in tree(page).all("div", "body")).startswith(prompt + "▸")
    assert cut


def test_a_store_of_one_document(generate):
    result, _, _ = generate(PROMPT, store="single")
    read = [neighbor for chunk in result["texts"][0]["chunks"][1:] for neighbor in chunk["neighbors"]]
    assert {neighbor["document_id"] for neighbor in read} == {"only"}


def test_script_tags_in_documents_are_text(generate):
    result, _, page = generate(TAGS)
    passages = [div.text for div in tree(page).all("div", "passage")]
    assert any("<script>" in passage for passage in passages) and len(tree(page).all("script")) == 1
    assert not tree(page).all("img") and not [a for a in tree(page).all("a") if a.attributes["href"][0] != "#"]


def test_all_neighbors_missing(generate):
    """Words that the store does not hold find nothing."""
    result, printed, page = generate("🦊" * 20)
    assert all(chunk["neighbors"] == [] for chunk in result["texts"][0]["chunks"][:5])
    assert "no neighbors" in page and result["texts"][0]["retrieved"]
