"""The engine: rows together say what they say alone, whatever goes wrong with one of them."""

import threading

import pytest
import torch

from retro import retrofit
from retro.serve.engine import Engine
from retro.serve.lanes import QueueFull
from retro.serve.rows import Row, RowCancelled
from tests.stand_ins import words
from tests.waiting import FOREVER, wait_until

LENGTHS = [1, 7, 8, 9, 20, 3, 33, 16]
PLACES = [("main", 2), ("hostile", 2), (None, None), ("main", 3), ("main", 2), ("lone", 1), ("main", 2), (None, None)]


class Listener:
    """A row's events; `ended` is set with the last."""

    def __init__(self, row: Row) -> None:
        self.row, self.events, self.ended = row, [], threading.Event()
        row.send = self.send

    def send(self, kind, value):
        self.events.append((kind, value))
        if kind in ("end", "error"):
            self.ended.set()

    @property
    def text(self) -> str:
        return "".join(value for kind, value in self.events if kind == "text")

    @property
    def sources(self) -> dict[int, dict]:
        return {chunk["chunk"]: chunk for kind, value in self.events if kind == "sources" for chunk in value}


def prompt(tokenizer, length, seed=0):
    return tokenizer(words(length, seed=seed))["input_ids"]


def make_rows(tokenizer, **options):
    return [
        Row(prompt(tokenizer, n, i), 12 + i, store=store, num_neighbors=k, seed=i, **options)
        for i, (n, (store, k)) in enumerate(zip(LENGTHS, PLACES, strict=True))
    ]


def finish(engine, rows, together=True):
    """Listeners of rows that have ended, submitted at once, those of one store together, or one after the other."""
    listeners = [Listener(row) for row in rows]
    of_store = {row.store: [other for other in rows if other.store == row.store] for row in rows}
    with engine:
        for group in of_store.values() if together else [[row] for row in rows]:
            engine.submit(group)
            for row in group if not together else ():
                assert listeners[rows.index(row)].ended.wait(FOREVER)
        assert all(listener.ended.wait(FOREVER) for listener in listeners)
    return listeners


def by_generate(model, tokenizer, stores, row):
    """What generate() itself continues a row with, greedily: tokens and text."""
    options = {"retriever": stores[row.store], "num_neighbors": row.num_neighbors} if row.store else {}
    ids = torch.tensor([row.prompt_ids])
    out = model.generate(ids, max_new_tokens=row.max_new_tokens, do_sample=False, pad_token_id=0, **options)[0].tolist()
    texts = [tokenizer.decode(some, skip_special_tokens=True) for some in (out, row.prompt_ids)]
    return out[len(row.prompt_ids) :], texts[0].removeprefix(texts[1])


def test_rows_together_say_what_generate_says_alone(make_engine, model, tokenizer, stores):
    for listener in finish(make_engine(), make_rows(tokenizer)):
        ids, text = by_generate(model, tokenizer, stores, listener.row)
        assert listener.row.new_ids == ids and listener.text == text
        assert listener.events[-1] == ("end", "stop" if ids[-1] == 1 else "length")


def test_a_fitted_model_serves_too(model, tokenizer, stores):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), eos_token_id=1, pad_token_id=0, **sizes)).eval()
    fitted = retrofit(base, chunk_len=8, retrieved_len=16).eval()
    for listener in finish(Engine(fitted, tokenizer, stores), make_rows(tokenizer)):
        assert listener.row.new_ids == by_generate(fitted, tokenizer, stores, listener.row)[0]


def test_the_test_above_could_fail(make_engine, model, tokenizer, stores):
    """The stores and OFF differ in what they make of one prompt."""
    ids = prompt(tokenizer, 33)
    rows = [Row(ids, 20, store=store, num_neighbors=k) for store, k in dict.fromkeys(PLACES)]
    assert len({listener.text for listener in finish(make_engine(), rows)}) == len(rows)


def test_sampled_rows_do_not_depend_on_the_batch(make_engine, tokenizer):
    options = {"temperature": 0.8, "top_p": 0.9}
    together = finish(make_engine(), make_rows(tokenizer, **options))
    alone = finish(make_engine(), make_rows(tokenizer, **options), together=False)
    assert [listener.text for listener in together] == [listener.text for listener in alone]
    rows = [Row(prompt(tokenizer, 9), 12, temperature=1.0, seed=seed) for seed in (0, 1, 0)]
    first, second, again = (listener.text for listener in finish(make_engine(), rows))
    assert first == again != second


class SpyOnBatches:
    """A model that notes the size of each batch and the k it was given."""

    def __init__(self, model):
        self._model, self.batches = model, []

    def __getattr__(self, name):
        return getattr(self._model, name)

    def generate(self, ids, **options):
        retriever = options.get("retriever")
        name = retriever and retriever.retriever.__self__.search.name
        self.batches.append((name or "off", options.get("num_neighbors"), len(ids)))
        return self._model.generate(ids, **options)


def test_only_rows_that_retrieve_alike_share_a_batch(make_engine, model, tokenizer, stores):
    engine = make_engine(max_batch=3)
    engine.model = SpyOnBatches(model)
    finish(engine, make_rows(tokenizer))
    main = [("main", 2, 3), ("main", 3, 1)]
    assert [batch for batch in engine.model.batches if batch[0] == "main"] == main
    assert sorted(engine.model.batches, key=str) == [("hostile", 2, 1), ("lone", 1, 1), *main, ("off", None, 2)]


def test_sources_are_what_the_retriever_finds(make_engine, tokenizer, stores):
    row = Row(prompt(tokenizer, 20), 21, store="main", num_neighbors=2)
    (listener,) = finish(make_engine(), [row])
    ids, retriever = row.prompt_ids + row.new_ids, stores["main"]
    assert sorted(listener.sources) == list(range(2, -(-len(ids) // 8)))
    for number, chunk in listener.sources.items():
        found = retriever([ids[number * 8 - 8 : number * 8]], 2)
        assert [n["row"] for n in chunk["neighbors"]] == found.ids[0].tolist()
        assert [n["title"] for n in chunk["neighbors"]] == [source.title for source in found.sources[0]]
        assert (chunk["start"], chunk["stop"]) == (number * 8, min(number * 8 + 8, len(ids)))
        for neighbor in chunk["neighbors"]:
            check_copied(neighbor, chunk, row, tokenizer)


def check_copied(neighbor, chunk, row, tokenizer):
    """The run stands where it says it does, in the text and in the neighbor, and no other is longer."""
    new = (row.prompt_ids + row.new_ids)[max(chunk["start"], len(row.prompt_ids)) : chunk["stop"]]
    passage = tokenizer(neighbor["text"])["input_ids"]
    runs = [new[i:j] for i in range(len(new)) for j in range(i + 1, len(new) + 1)]
    inside = lambda run: any(passage[i : i + len(run)] == run for i in range(len(passage)))  # noqa: E731
    assert (
        max((len(run) for run in runs if inside(run)), default=0)
        == (neighbor["copied"] or {"num_tokens": 0})["num_tokens"]
    )
    if neighbor["copied"]:
        copied = neighbor["copied"]
        run = (row.prompt_ids + row.new_ids)[copied["start"] : copied["start"] + copied["num_tokens"]]
        assert passage[copied["neighbor_start"] : copied["neighbor_start"] + copied["num_tokens"]] == run


def test_sources_come_before_the_text_that_read_them(make_engine, tokenizer):
    (listener,) = finish(make_engine(), [Row(prompt(tokenizer, 6), 20, store="main", num_neighbors=2)])
    kinds = [kind for kind, _ in listener.events]
    assert kinds[:4] == ["text", "text", "sources", "text"] and kinds[-2:] == ["sources", "end"]


def test_a_cancelled_row_stops_costing_and_the_others_go_on(make_engine, model, tokenizer, stores):
    staying = Row(prompt(tokenizer, 9), 40, store="main", num_neighbors=2)
    leaving = Row(prompt(tokenizer, 3), 15_000, store="main", num_neighbors=2)
    listeners, send = [Listener(staying), Listener(leaving)], leaving.send

    def leave(kind, value):
        leaving.cancelled = len(leaving.new_ids) >= 5
        send(kind, value)

    leaving.send = leave
    engine = make_engine()
    with engine:
        engine.submit([staying, leaving])
        assert all(listener.ended.wait(FOREVER) for listener in listeners)
        wait_until(lambda: engine.load == {"waiting": 0, "running": 0})
        assert listeners[0].text == by_generate(model, tokenizer, stores, staying)[1]
    assert len(leaving.new_ids) == 5 and isinstance(listeners[1].events[-1][1], RowCancelled)


def test_a_row_cancelled_while_it_waits_never_runs(make_engine, tokenizer):
    rows = [Row(prompt(tokenizer, 9), 30, store="main", num_neighbors=k) for k in (1, 2)]
    listeners, engine, send = [Listener(row) for row in rows], make_engine(), rows[0].send

    def cancel_the_other(kind, value):
        rows[1].cancelled = True
        send(kind, value)

    rows[0].send = cancel_the_other
    with engine:
        engine.submit(rows)
        assert listeners[0].ended.wait(FOREVER)
    assert rows[1].new_ids == []


def test_a_full_queue_refuses_all_or_nothing(make_engine, tokenizer):
    engine = make_engine(max_queue=3, max_batch=3)
    leave = threading.Event()
    engine._lanes[None]._thread = threading.Thread(target=leave.wait)  # a worker that takes nothing
    with engine:
        rows = [Row(prompt(tokenizer, 2), 2) for _ in range(6)]
        engine.submit(rows[:2])
        with pytest.raises(QueueFull):
            engine.submit(rows[2:4])
        rows[0].cancelled = True
        engine.submit(rows[4:])
        assert engine.load["waiting"] == 3
        leave.set()
    with pytest.raises(RowCancelled):
        engine.submit(rows[:1])


class Broken:
    """A retriever that fails."""

    def __call__(self, queries, **options):
        raise RuntimeError("the disk is gone")


def test_a_batch_that_fails_fails_alone(model, tokenizer, stores, caplog):
    engine = Engine(model, tokenizer, stores | {"broken": Broken()})
    rows = [Row(prompt(tokenizer, 9), 5, store=store, num_neighbors=2) for store in ("broken", "main", "broken")]
    listeners = finish(engine, rows)
    assert [listener.events[-1][0] for listener in listeners] == ["error", "end", "error"]
    assert listeners[1].text == by_generate(model, tokenizer, stores, rows[1])[1]
    assert "the disk is gone" in caplog.text


def test_shutdown_ends_what_runs_and_what_waits(make_engine, tokenizer):
    rows = [Row(prompt(tokenizer, 9), 15_000), Row(prompt(tokenizer, 9), 15_000, store="main", num_neighbors=2)]
    listeners, engine = [Listener(row) for row in rows], make_engine()
    with engine:
        for row in rows:
            engine.submit([row])
        wait_until(lambda: listeners[0].events)
    assert all(isinstance(listener.events[-1][1], RowCancelled) for listener in listeners)
    assert not engine.is_alive
