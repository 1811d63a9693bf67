"""Stores that hang, fail and come back: what reads from others goes on, and what reads from them is told."""

import threading
from types import SimpleNamespace

import pytest

from retro.serve import searching
from retro.serve.engine import Engine
from retro.serve.limits import GenerationLimits
from retro.serve.rows import Row
from tests.serve.conftest import ask_all
from tests.serve.test_engine import Listener, by_generate, prompt
from tests.waiting import FOREVER, wait_until


class Faulty:
    """A retriever that waits while it is `held`, and raises `error` if there is one."""

    def __init__(self, retriever, error=None):
        self.retriever, self.error, self.num_calls, self.free = retriever, error, 0, threading.Event()
        self.store, self.index = retriever.store, retriever.index

    def __call__(self, queries, **options):
        self.num_calls += 1
        assert self.free.wait(FOREVER)
        if self.error is not None:
            raise self.error
        return self.retriever(queries, **options)


@pytest.fixture
def faulty(stores):
    faulty = Faulty(stores["hostile"])
    yield faulty
    faulty.free.set()


@pytest.fixture
def make_engine(model, tokenizer, stores, faulty):
    """make_engine(**limits): an engine whose second store is `faulty`."""
    limits = {"max_seconds": FOREVER, "max_search_seconds": FOREVER}
    return lambda **given: Engine(
        model, tokenizer, {"main": stores["main"], "faulty": faulty}, GenerationLimits(**{**limits, **given})
    )


def submit(engine, tokenizer, store, k=2):
    listener = Listener(Row(prompt(tokenizer, 20), 12, store=store, num_neighbors=k))
    engine.submit([listener.row])
    return listener


def test_a_store_that_hangs_holds_up_nobody_else(make_engine, faulty, model, tokenizer, stores):
    with make_engine() as engine:
        hung = submit(engine, tokenizer, "faulty")
        wait_until(lambda: faulty.num_calls)
        others = [submit(engine, tokenizer, store, k) for store, k in (("main", 2), (None, None), ("main", 1))]
        assert all(other.ended.wait(FOREVER) for other in others) and not hung.events
        faulty.free.set()
        assert hung.ended.wait(FOREVER)
    for listener in (hung, *others):
        own = stores | {"faulty": stores["hostile"]}
        assert listener.text == by_generate(model, tokenizer, own, listener.row)[1]


def test_a_store_that_is_late_is_spared_until_its_search_is_over(make_engine, faulty, tokenizer, monkeypatch, caplog):
    monkeypatch.setattr(searching, "_FIRST_REST", 0.0)
    with make_engine(max_search_seconds=0.05) as engine:
        listeners = [submit(engine, tokenizer, "faulty", k) for k in (1, 2)]  # two batches
        for listener, status, said in zip(
            listeners, (504, 503), ("has not answered in 0.05 s", "does not"), strict=True
        ):
            assert listener.ended.wait(FOREVER)
            error = listener.events[-1][1]
            assert error.status == status and f"the store faulty {said}" in str(error)
        assert faulty.num_calls == 1 and engine.stores_down == ["faulty"]
        with pytest.raises(Exception, match="the store faulty does not answer at present; try again later"):
            submit(engine, tokenizer, "faulty")
        faulty.free.set()
        wait_until(lambda: not engine.stores_down)
        again = submit(engine, tokenizer, "faulty")
        assert again.ended.wait(FOREVER) and again.events[-1][0] == "end"
    assert "Traceback" not in caplog.text and caplog.text.count("is spared") == 1


def test_a_store_that_is_away_is_spared_for_a_while(make_engine, faulty, caplog):
    faulty.error = ConnectionError("http://10.0.0.1 gave no answer")
    faulty.free.set()
    asked = lambda store: ("/v1/completions", {"prompt": "w1 " * 20, "retro": {"store": store}})  # noqa: E731
    with_it = [asked("faulty"), asked("main"), asked("faulty"), ("/health", None)]
    first, main, second, health = ask_all(make_engine(), with_it, in_turn=True)
    assert (first.status_code, main.status_code, second.status_code) == (503, 200, 503)
    assert "the store faulty cannot be reached" in first.text and "10.0.0.1" not in first.text
    assert "the store faulty does not answer at present" in second.text and second.headers["retry-after"] == "1"
    assert faulty.num_calls == 1 and health.json()["stores_down"] == ["faulty"]
    assert "10.0.0.1" in caplog.text and "Traceback" not in caplog.text


def test_rests_grow_until_a_search_succeeds(faulty, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(searching, "time", SimpleNamespace(monotonic=lambda: now[0]))
    faulty.free.set()
    rests = []
    with searching.StoreSearch("faulty", faulty, FOREVER) as search:
        for error in [ConnectionError()] * 7 + [None, ConnectionError()]:
            faulty.error = error
            try:
                search(["w1"], num_neighbors=1)
            except Exception:
                rests.append(search._again_at - now[0])
            now[0] = search._again_at
    assert rests == [1, 2, 4, 8, 16, 32, 32, 1]


def test_shutdown_does_not_wait_for_a_store_that_hangs(make_engine, faulty, tokenizer):
    with make_engine() as engine:
        hung = submit(engine, tokenizer, "faulty")
        wait_until(lambda: faulty.num_calls)
    assert hung.events[-1][0] == "error" and not faulty.free.is_set()
