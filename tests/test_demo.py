"""The demo's own parts: which documents are held out, and what the closing page says. The whole runs in `make demo`."""

import json

import pytest

from retro import demo
from retro.cli import main
from retro.demo import closing_page, plot_losses, run_demo, write_corpus
from retro.text.documents import Document


@pytest.fixture
def families(monkeypatch):
    names = [f"{clan}{i}" for clan in ("bert", "llama", "whisper", "vit", "t") for i in range(12)] + ["alone"]
    documents = [Document(f"transformers.models.{name}", name * 1000) for name in names]
    documents += [Document("transformers.trainer", "x" * 5000), Document("transformers.models.bertshort", "x")]
    monkeypatch.setattr(demo, "package_documents", lambda packages: iter(documents))


def test_held_out_families_have_relatives_in_the_datastore(families, tmp_path):
    write_corpus(tmp_path)
    ids = {
        name: [json.loads(line)["id"] for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "valid")
    }
    assert ids["train"] and ids["valid"] and not set(ids["train"]) & set(ids["valid"])
    everything = ids["train"] + ids["valid"]
    assert "transformers.models.alone" not in everything, "a family without relatives"
    assert "transformers.trainer" not in everything and "transformers.models.bertshort" not in everything
    clan = lambda name: name.split(".")[-1].rstrip("0123456789")  # noqa: E731
    assert {clan(name) for name in ids["valid"]} <= {clan(name) for name in ids["train"]}
    first = (tmp_path / "valid.jsonl").read_bytes()
    write_corpus(tmp_path)
    assert (tmp_path / "valid.jsonl").read_bytes() == first


def test_a_training_that_is_stopped_stops_the_demo(monkeypatch, tmp_path, capsys):
    for name in ("write_corpus", "_train_tokenizer", "_build_store", "_find_neighbors"):
        monkeypatch.setattr(demo, name, lambda given: None)
    asked = []
    monkeypatch.setattr("retro.training.pretrain.main", lambda recipe, given: asked.append(given))  # SIGTERM or Ctrl-C
    assert main(["demo", "--output", str(tmp_path / "demo")]) == 130
    assert len(asked) == 1 and capsys.readouterr().err.endswith("retro: stopped\n")


def test_plot_and_closing_page(tmp_path):
    for name in ("lm", "retro"):
        (tmp_path / name).mkdir()
        lines = [{"step": s, "tokens": 1024 * s, "loss": 9 / s, "lr": 0.1} for s in (1, 2, 3)]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    plot_losses(tmp_path)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    columns = {"lm": 2.0, "retro_off": 2.5, "retro_on": 1.5, "retro_on_random": 3.0}
    result = {"bpb": columns, "bpb_little_overlap": columns, "documents": 3, "chunks": 9, "chunks_little_overlap": 4}
    result |= {"gain": {"lm": [0.25, 0.125, 0.5], "retro_off": [0.4, -0.1, 0.6]}}
    result |= {"bytes": 1000, "num_neighbors": 2, "seconds": 120.0, "near_copies_removed": 5}
    result |= {"gain_little_overlap": {"lm": [0.01, -0.02, 0.03], "retro_off": [0.0, -0.01, 0.01]}}
    result |= {"off_below_lm": [-0.25, -0.5, 0.125]}
    page = closing_page(tmp_path, result, "a sample")
    lines = [" ".join(line.split()) for line in page.splitlines()]
    assert "RETRO[ON] below LM 25.0 (12.5 to 50.0) 1.0 (-2.0 to 3.0)" in lines
    assert "RETRO[ON] below RETRO[OFF] 40.0 (-10.0 to 60.0) 0.0 (-1.0 to 1.0)" in lines
    assert "RETRO[OFF] below LM -25.0 (-50.0 to 12.5)" in lines
    assert "removed from the datastore: 5" in page and str(tmp_path / "results.json") in page


def test_a_folder_in_use_is_refused(tmp_path):
    (tmp_path / "mine").write_text("")
    with pytest.raises(ValueError, match="is in use; remove it or give another --output"):
        run_demo(tmp_path)
