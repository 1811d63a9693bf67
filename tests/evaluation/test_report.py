"""The report of real results: every figure on the page, parts that do not compare apart, nothing that can act."""

import base64
import hashlib
import json
import re
from dataclasses import replace

import pytest
import torch

from retro.cli import main
from retro.common.files import write_result
from retro.evaluation import ScoringSettings, bits_per_byte, measure_leakage, sweep_neighbors
from retro.evaluation.baselines import BaselineSettings, measure_baselines
from retro.evaluation.report import read_runs, report_page
from retro.evaluation.report.files import Result
from retro.evaluation.report.pictures import picture_of_bits
from retro.evaluation.report.samples import attribution_from_json
from retro.evaluation.tasks import Passage, Question, Reader, measure_lambada, recall
from retro.provenance import write_provenance
from retro.retrieval.search.lexical import build_lexical
from retro.sampling import as_json, sample
from retro.text.documents import Document
from tests.evaluation.conftest import HELD_OUT
from tests.sampling.test_page import HOSTILE, Tree
from tests.stand_ins import words

KINDS = ("evaluate", "leakage", "sweep", "baselines", "task", "generate")


@pytest.fixture(scope="module")
def model(words_tokenizer):
    """A RETRO of words, and one that reads its neighbors however little it has learned."""
    from retro import RetroConfig, RetroForCausalLM

    torch.manual_seed(0)
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, chunk_len=8, retrieved_len=16)
    return RetroForCausalLM(RetroConfig(vocab_size=len(words_tokenizer), cca_layers=[2], **sizes)).eval()


@pytest.fixture(scope="module")
def attributions(model, planted_retriever, words_tokenizer):
    given = dict(gains=True, max_new_tokens=12, num_neighbors=2)
    return sample(model, words_tokenizer, [words(12, seed=5), words(9, seed=6)], planted_retriever, **given)


@pytest.fixture(scope="module")
def results(model, planted_retriever, words_tokenizer, attributions):
    """What each verb that measures writes, by kind."""
    about = {"data": ["held.jsonl"], "store": "store"}
    reading = ScoringSettings(window_len=64, cache=False)
    few = BaselineSettings(methods=("retro_off", "retro_on", "retro_on_random"), window_len=32, stride=16)
    reader = Reader(model=model, tokenizer=words_tokenizer, retriever=planted_retriever, retrieval="on", cache=False)
    last_words = [Document(f"last {i}", words(20, seed=70 + i)) for i in range(4)]
    return {
        "evaluate": bits_per_byte(model, HELD_OUT, planted_retriever, 2, scoring=reading) | about,
        "leakage": measure_leakage(model, HELD_OUT, planted_retriever, 2, scoring=reading) | about,
        "sweep": sweep_neighbors(model, HELD_OUT, planted_retriever, (0, 1, 3), scoring=reading) | about,
        "baselines": measure_baselines({"run": model}, HELD_OUT, planted_retriever, settings=few) | about,
        "task": measure_lambada(reader, last_words) | about | {"data": ["last.jsonl"]},
        "generate": {"texts": [as_json(text) for text in attributions], "model": "run", "store": "store"},
    }


@pytest.fixture
def files(results, tmp_path):
    """The same as files, by kind."""
    for kind, value in results.items():
        write_result(tmp_path / f"{kind}.json", value)
    return {kind: tmp_path / f"{kind}.json" for kind in results}


def page_of(*paths) -> str:
    return report_page(read_runs(paths))


def text_of(page: str) -> str:
    """What a reader sees, without styles and scripts."""
    return re.sub(r"<(style|script)>.*?</\1>", "", page, flags=re.DOTALL)


def tables(page: str) -> dict[str, list[list[str]]]:
    """Rows of cells by the caption of the table."""
    found = {}
    for table in Tree(page).root.all("table"):
        caption = next((one.text for one in table.all("caption")), "")
        found[caption] = [[cell.text for cell in row.all("td")] for row in table.all("tr")]
    return found


def test_every_kind_is_known_by_what_it_holds(files):
    runs = read_runs(list(files.values()))
    assert [result.kind for result in runs.results] == list(KINDS)


def test_every_figure_stands_in_its_table(files, results):
    found = tables(page_of(*files.values()))
    rows = {row[1]: row for row in found["Bits per byte"] if row}
    for column, title in (("retro_off", "RETRO[OFF]"), ("retro_on", "RETRO[ON]")):
        low, high = results["evaluate"]["interval"][column]
        assert rows[title][2] == f"{results['evaluate']['bpb'][column]:.4f}"
        assert rows[title][3] == f"{low:.4f} to {high:.4f}"
    gains = found[f"What RETRO[ON] gains: {files['evaluate']}"][1:]
    told = [f"RETRO[ON] below {title}" for title in ("RETRO[OFF]", "RETRO[ON], random")]
    assert [row[0] for row in gains] == told
    below = round(100 * results["evaluate"]["gain"]["retro_off"][0], 1) + 0.0  # not -0.0
    assert gains[0][1].startswith(f"{below:.1f} (")
    curves = found["Bits per byte over the chunks that overlap with their neighbors by no more than r(C)"][1:]
    for row, point in zip(curves, results["leakage"]["points"], strict=True):
        assert row[:2] == [f"{100 * point['alpha']:g}%", f"{point['chunks']:,}"]
        assert row[4].startswith(f"{point['bpb']['retro_on']:.4f} (")
    swept = [row[:3] for row in found["Sweep over neighbors"][1:]]
    curve = results["sweep"]["curve"]
    assert swept[:3] == [[str(p["num_neighbors"]), "RETRO[ON]", f"{p['bpb']:.4f}"] for p in curve]
    methods = found["Baselines on the same store"][1:]
    assert [row[3] for row in methods] == [f"{row['bpb']:.4f}" for row in results["baselines"]["rows"]]
    tasks = {row[0]: row for row in found["Task: lambada"][1:]}
    assert tasks["RETRO[ON]"][1].startswith(f"{results['task']['accuracy']['retro_on']['value']:.4f} (")


def test_a_picture_stands_beside_its_data(files, results):
    figures = Tree(page_of(*files.values())).root.all("figure")
    assert len(figures) == 5
    for figure in figures:
        (image,) = figure.all("img")
        kind, data = image.attributes["src"].split(",")
        assert kind == "data:image/svg+xml;base64" and b"<svg" in base64.b64decode(data)
    sweep = next(figure for figure in figures if "neighbors per chunk" in figure.text)
    assert all(f"{point['bpb']:,.5g}" in sweep.text for point in results["sweep"]["curve"])


def test_an_interval_that_does_not_hold_its_figure_is_drawn(results):
    value = results["evaluate"] | {"interval": {column: [9.0, 10.0] for column in results["evaluate"]["bpb"]}}
    picture = picture_of_bits([Result("a", "evaluate", value, sha256="", written_at="")])
    assert picture.address.startswith("data:image/svg+xml") and picture.caption == "Bits per byte, with 95% intervals"


def test_other_text_stores_or_tokens_stand_apart(results, tmp_path):
    def write(name, **changes):
        write_result(tmp_path / f"{name}.json", results["evaluate"] | changes)
        return tmp_path / f"{name}.json"

    same = [write("a", model="one"), write("b", model="two")]
    page = page_of(*same)
    assert len(tables(page)["Bits per byte"]) == 1 + 6 and "do not compare" not in page
    others = [
        write("data", data=["other.jsonl"]),
        write("store", store_fingerprint="f" * 64),
        write("bytes", bytes=results["evaluate"]["bytes"] + 1),
        write("tokens", tokens=results["evaluate"]["tokens"] + 1),
    ]
    for other in others:
        page = page_of(*same, other)
        captions = [one.text for one in Tree(page).root.all("caption")]
        assert captions.count("Bits per byte") == 2, other
        assert "The 2 parts that follow were measured on different text" in page


def test_recall_answers_and_lm_eval(tmp_path):
    questions = [Question(str(i), "w1?", ("w2",), (Passage("t", "w3 w2", "d1"),), "d1") for i in range(3)]
    answers = [{"id": "0", "question": "w1?", "right": ["w2"], "lm": "w5"}]
    figures = {"exact_match": {"in_context": {"value": 0.5, "interval": [0.25, 0.75]}}}
    written = {
        "recall": {"task": "recall", "data": "q.json", "store": None, "recall": {"bm25": recall(questions, (1, 2))}},
        "qa": {"task": "question answering", "questions": 1, "answers": answers, **figures},
        "harness": {
            "results": {"lambada_openai": {"alias": "lambada", "acc,none": 0.25, "acc_stderr,none": 0.03}},
            "n-shot": {"lambada_openai": 0},
            "n-samples": {"lambada_openai": {"original": 5153, "effective": 200}},
            "versions": {"lambada_openai": 1.0},
            "data": None,
        },
    }
    for name, value in written.items():
        write_result(tmp_path / f"{name}.json", value)
    found = tables(page_of(tmp_path))
    right = ["1.0000 (1.0000 to 1.0000)"] * 2
    assert found["Recall of the right passage"][1:] == [["bm25", kind, *right] for kind in ("by id", "by answer")]
    assert found["Task: question answering"][1] == ["passages in the prompt", "0.5000 (0.2500 to 0.7500)"]
    assert found["The first of 1 answers"][1] == ["0", "w1?", "w2", "w5"]
    assert found["Tasks of lm_eval"][1] == ["lambada_openai", "acc", "0.25", "0.03", "200"]


def test_attributions_come_back_from_json(attributions):
    for text in attributions:
        assert any(chunk.neighbors for chunk in text.chunks)
        written = json.loads(json.dumps(as_json(text)))
        assert attribution_from_json(written) == text
        as_read = replace(text, gains=None)
        assert attribution_from_json(json.loads(json.dumps(as_json(as_read)))) == as_read


def test_samples_show_their_sources(files, attributions):
    root = Tree(page_of(files["generate"])).root
    shown = " ".join(one.text for one in root.all(name="where"))
    for chunk in attributions[0].chunks:
        for neighbor in chunk.neighbors:
            assert neighbor.source.title in shown
    assert len(root.all(name="attribution")) == 2


def hostile(value, number=0):
    """The value with every text that a stranger may have written replaced by hostile ones."""
    if isinstance(value, dict):
        free = ("title", "document_id", "source", "model", "store", "xlabel", "band", "label", "task", "index")
        return {
            name: HOSTILE[(number + i) % len(HOSTILE)] + r"$\frac{" + "\ud800"
            if name in free and isinstance(one, str)
            else hostile(one, number + i)
            for i, (name, one) in enumerate(value.items())
        }
    if isinstance(value, list):
        return [hostile(one, number + i) for i, one in enumerate(value)]
    return HOSTILE[number % len(HOSTILE)] if isinstance(value, str) and value.startswith(" w") else value


def test_nothing_in_a_result_can_act(results, tmp_path):
    paths = []
    for turn in range(3):
        for kind in KINDS:
            paths.append(tmp_path / f"{kind}{turn}.json")
            value = hostile(results[kind], turn * 4) | {"data": HOSTILE[turn::3]}
            paths[-1].write_text(json.dumps(value, allow_nan=True))
    page = page_of(*paths)
    page.encode("utf-8")
    root = Tree(page).root
    elements = root.all()
    assert [one.tag for one in elements if one.tag in ("script", "iframe", "object", "link", "base")] == ["script"]
    for element in elements:
        assert not [name for name in element.attributes if name.startswith("on") or name == "style"]
        for name in ("src", "href"):
            assert element.attributes.get(name, "#").startswith(("#", "data:image/svg+xml;base64,"))
    assert "alert(1)" in root.text and "{{ 7 * 7 }}" in root.text and "\u202e" not in page
    assert len({one.attributes["id"] for one in elements if "id" in one.attributes}) == len(
        [one for one in elements if "id" in one.attributes]
    )


def test_the_policy_lets_the_pages_own_styles_and_script_count(files):
    page = page_of(*files.values())
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1].replace("&#39;", "'")
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    digest = lambda text: f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"  # noqa: E731
    styles, scripts = (re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL) for tag in ("style", "script"))
    assert rules["default-src"] == "'none'" and rules["img-src"] == "data:"
    assert rules["style-src"].split() == [digest(style) for style in styles]
    assert rules["script-src"].split() == [digest(script) for script in scripts]
    assert not re.search(r"url\(|@import", " ".join(styles))


# Files and folders


def test_a_folder_with_models_a_store_and_results(files, planted_store, model, tmp_path, monkeypatch):
    run = tmp_path / "run"
    model.save_pretrained(run)
    write_provenance(run, planted_store)
    (run / "config.yaml").write_text("lr: 0.125\n")
    lines = [{"step": i, "tokens": 100 * i, "loss": 8.0 - i / 100} for i in range(500)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "notes.json").write_text('{"else": 1}')
    (tmp_path / "again.json").write_bytes(files["sweep"].read_bytes())
    build_lexical(planted_store, "tfidf")
    runs = read_runs([tmp_path, files["sweep"], planted_store.path])
    assert sorted(result.kind for result in runs.results) == sorted(KINDS)
    assert [one.name for one in runs.models] == [str(run)] and runs.passed_over == [str(tmp_path / "notes.json")]
    assert runs.stores[0].fingerprint == planted_store.fingerprint
    page = report_page(runs)
    assert (
        "recall@10 of tfidf" in page
        and "lr: 0.125" in page
        and planted_store.fingerprint in page
        and "notes.json" in page
    )
    losses = next(one for one in Tree(page).root.all("figure") if "Training loss" in one.text)
    rows = [[cell.text for cell in row.all("td")] for row in losses.all("tr")][1:]
    assert 100 <= len(rows) <= 200 and rows[0][1:] == ["0", "8"] and rows[1][1:] == ["300", "7.97"]
    same = [result for result in runs.results if result.same]
    assert len(same) == 1 and same[0].kind == "sweep" and "The same content" in page


def put(value, path, new):
    """A copy with the value at the path replaced; new None: left out."""
    value = json.loads(json.dumps(value))
    *above, last = path
    inner = value
    for name in above:
        inner = inner[name]
    if new is None:
        del inner[last]
    else:
        inner[last] = new
    return value


DAMAGED = {
    "a column without its figure": (
        "evaluate",
        ["bpb", "retro_on"],
        "much",
        "bpb.retro_on is 'much': it should be a",
    ),
    "a column of another kind": ("evaluate", ["bpb", "mamba"], 1.0, "bpb.mamba is 'mamba': it should be 'lm'"),
    "no bytes": ("evaluate", ["bytes"], None, "bytes is missing"),
    "one end of an interval": (
        "leakage",
        ["points", 0, "interval", "retro_on"],
        [1.0],
        "interval.retro_on is a list: it should have",
    ),
    "no points": ("leakage", ["points"], [], "points is a list: it should have at least 1 item, not 0"),
    "a point without a column": ("leakage", ["points", 1, "bpb", "retro_off"], None, "different columns"),
    "a place that is no number": ("sweep", ["curve", 1, "num_neighbors"], "two", "curve[1].num_neighbors is 'two'"),
    "half a gain": ("sweep", ["curve", 0, "gain_low"], None, "curve[0].gain is missing"),
    "a method without a name": (
        "baselines",
        ["rows", 0, "label"],
        3,
        "rows[0].label is 3: it should be",
    ),
    "a figure without a value": ("task", ["accuracy", "retro_on", "value"], [], "accuracy.retro_on.value is a list"),
    "a chunk beyond the text": ("generate", ["texts", 0, "chunks", 0, "stop"], 999, "a chunk from 0 to 999"),
    "fewer gains than tokens": ("generate", ["texts", 0, "gains"], [0.5], "gains"),
    "a number beyond all": ("evaluate", ["bytes"], 10**400, "it should be less than"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_file_is_refused_by_name(case, results, tmp_path, capsys):
    kind, path, new, told = DAMAGED[case]
    file = tmp_path / "damaged.json"
    file.write_text(json.dumps(put(results[kind], path, new)))
    assert main(["report", str(file), "--output", str(tmp_path / "a.html")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"retro: error: {file} is damaged") and told in line
    assert not (tmp_path / "a.html").exists()


REFUSED = {
    "another JSON": (b'{"store": "s", "counts": {}}', "holds no result; give what --json"),
    "no JSON": (b'{"bpb": ', "is not JSON"),
    "no text": (b"\xff\xfe\x00", "is not JSON"),
    "no end of it": (b"[" * 100_000, "is not JSON"),
    "a list": (b"[1, 2]", "holds no result"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_result_is_refused_by_name(case, tmp_path):
    content, told = REFUSED[case]
    (tmp_path / "some.json").write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "some.json"))) as refused:
        read_runs([tmp_path / "some.json"])
    assert told in str(refused.value)


def test_missing_and_empty_places_are_refused_by_name(tmp_path):
    (tmp_path / "empty").mkdir()
    for path, told in ((tmp_path / "nowhere.json", "is not there"), (tmp_path / "empty", "holds no result")):
        with pytest.raises(ValueError, match=told):
            read_runs([path])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "tokens": 2}\n{"step": 1\n')
    with pytest.raises(ValueError, match="metrics.jsonl, line 2"):
        read_runs([tmp_path])


def test_the_command(files, tmp_path, capsys):
    output = tmp_path / "report.html"
    assert main(["report", str(files["evaluate"]), str(files["generate"]), "--output", str(output)]) == 0
    assert str(output) in capsys.readouterr().out
    assert output.read_text(encoding="utf-8").startswith("<!doctype html>")
    for wrong, told in ((tmp_path / "report.pdf", ".html"), (tmp_path, ".html")):
        assert main(["report", str(files["evaluate"]), "--output", str(wrong)]) == 2
        assert told in capsys.readouterr().err
