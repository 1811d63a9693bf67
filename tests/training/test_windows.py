"""Windows against a naive reading of the same store, the order shared by ranks, and resuming at any position."""

import hashlib
import json
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from retro.retrieval.store.format import CHUNK_DTYPE, ShardArrays
from retro.retrieval.store.random_rows import random_rows
from retro.retrieval.store.store import Store
from retro.training.windows import IGNORED, Loader, Windows, epoch_order

M, PAD = 4, 0


def make_store(document_lens: list[int], shards: int = 1, seed: int = 0, removed: tuple[int, ...] = ()) -> Store:
    """A store in memory: documents of so many tokens, spread over shards, some removed; token ids tell them apart."""
    rng, records, parts, first_row = np.random.default_rng(seed), [], [], 0
    for share in np.array_split(np.arange(len(document_lens)), shards):
        tokens, chunks = [], []
        for local, document in enumerate(share):
            for position, start in enumerate(range(0, document_lens[document], M)):
                length = min(M, document_lens[document] - start)
                tokens.append(np.r_[rng.integers(1, 1000, length) + 1000 * document, np.full(M - length, PAD)])
                chunks.append((local, position, length))
        table = np.array(chunks, CHUNK_DTYPE)
        arrays = np.array(tokens, np.uint32).reshape(-1, M), table, np.zeros((len(table), 2), np.float32)
        parts.append(ShardArrays(*arrays, None))
        record = {"first_row": first_row, "first_document": int(share[0]), "rows": len(table), "documents": len(share)}
        record["files"] = {"tokens.npy": {"xxh3": hashlib.sha256(arrays[0].tobytes()).hexdigest()}}
        records, first_row = [*records, record], first_row + len(table)
    manifest = {
        "format_version": 2,
        "generation": 1,
        "tokenizer": {"fingerprint": "t"},
        "removed": {"xxh3": str(removed)},
        "shards": records,
        "chunk_len": M,
        "pad_token_id": PAD,
        "settings": {"min_chunk_len": 2},
        "embedder": {"dim": 2, "fingerprint": "e"},
    }
    counts = -(-np.array(document_lens, np.int64) // M)
    spans = np.stack([np.arange(len(counts)), np.cumsum(counts) - counts, counts], axis=1)
    return Store(Path("store"), manifest, parts, spans[list(removed)])


def live_rows(store: Store) -> list[int]:
    """The rows of documents that are not removed."""
    rows = np.arange(store.num_chunks)
    return rows[~np.isin(store.document_rows(rows), store.removed_documents)].tolist()


def make_some_store(document_lens: list[int], shards: int, removed: set[int]) -> Store:
    """A store of which not everything is removed."""
    kept = sum(document_lens) % len(document_lens)
    chosen = sorted(document for document in removed - {kept} if document < len(document_lens))
    return make_store(document_lens, min(shards, len(document_lens)), removed=tuple(chosen))


def make_table(store: Store, k: int = 2, missing: float = 0.3, seed: int = 0, target: Store | None = None):
    """Arbitrary neighbors, some missing."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, (target or store).num_chunks, (store.num_chunks, k))
    record = {"queries": store.fingerprint, "store": (target or store).fingerprint}
    return SimpleNamespace(rows=np.where(rng.random(rows.shape) < missing, -1, rows), record=record)


stores = st.builds(
    make_some_store,
    st.lists(st.integers(1, 3 * M + 1), min_size=1, max_size=8),
    st.integers(1, 3),
    st.one_of(st.just(set()), st.sets(st.integers(0, 7))),
)


def naive_window(store: Store, table, window: int, chunks_per_window: int, retrieved_len: int) -> dict[str, list]:
    """One window, token by token, from chunks read one at a time."""
    out = {name: [] for name in ("input_ids", "labels", "document_ids", "neighbor_ids", "neighbor_mask")}
    live = live_rows(store)
    for number in range(window * chunks_per_window, (window + 1) * chunks_per_window):
        there = number < len(live)
        row = live[number] if there else -1
        tokens = store.token_lists(np.array([row]))[0].tolist() if there else []
        document = int(store.document_rows(np.array(row))) if there else -1
        out["input_ids"] += tokens + [PAD] * (M - len(tokens))
        out["document_ids"] += [document] * M
        labels = tokens + [IGNORED] * (M - len(tokens))
        if tokens and (row == 0 or int(store.document_rows(np.array(row - 1))) != document):
            labels[0] = IGNORED
        out["labels"] += labels
        neighbors = table.rows[row] if there else np.full(table.rows.shape[1], -1)
        ids, mask = store.values(neighbors, retrieved_len)
        out["neighbor_ids"].append(ids.tolist())
        out["neighbor_mask"].append(mask.tolist())
    out["labels"][0] = IGNORED
    return out


@settings(max_examples=60)
@given(stores, st.integers(1, 4), st.integers(M, 3 * M), st.randoms(use_true_random=False))
def test_batches_are_what_a_naive_reading_gives(store, chunks_per_window, retrieved_len, random):
    table = make_table(store)
    windows = Windows(store, table, window_len=M * chunks_per_window, retrieved_len=retrieved_len)
    assert len(windows) == -(-len(live_rows(store)) // chunks_per_window)
    chosen = np.array(random.choices(range(len(windows)), k=3))
    batch = windows.batch(chosen)
    expected = [naive_window(store, table, int(window), chunks_per_window, retrieved_len) for window in chosen]
    for name, tensor in batch.items():
        assert tensor.tolist() == [one[name] for one in expected], name
    assert {t.dtype for t in batch.values()} == {torch.int64, torch.bool}


@settings(max_examples=40)
@given(stores, st.integers(1, 4))
def test_each_token_is_predicted_once_an_epoch_but_the_first_of_windows_and_documents(store, chunks_per_window):
    windows = Windows(store, window_len=M * chunks_per_window)
    batch = windows.batch(np.arange(len(windows)))
    assert "neighbor_ids" not in batch
    labels, ids, documents = (batch[name] for name in ("labels", "input_ids", "document_ids"))
    predicted = (labels != IGNORED).nonzero().tolist()
    assert all(labels[b, i] == ids[b, i] and i > 0 and documents[b, i - 1] == documents[b, i] for b, i in predicted)
    rows = np.array(live_rows(store))
    first_of_document = store.positions(rows) == 0
    first_of_window = np.arange(len(rows)) % chunks_per_window == 0
    assert len(predicted) == store.chunk_lens(rows).sum() - (first_of_document | first_of_window).sum()


def test_a_bos_stands_in_the_place_of_the_first_token_of_each_window():
    store = make_store([9, 3, 14, 5])
    plain, begun = (Windows(store, window_len=2 * M, bos=bos).batch(np.arange(4)) for bos in (None, 7))
    assert (begun["input_ids"][:, 0] == 7).all() and torch.equal(begun["input_ids"][:, 1:], plain["input_ids"][:, 1:])
    assert torch.equal(begun["labels"], plain["labels"])


def test_single_windows_and_a_data_loader_give_the_same_as_a_batch():
    store = make_store([9, 3, 14, 5])
    windows = Windows(store, make_table(store), window_len=2 * M, retrieved_len=8)
    batch = windows.batch(np.array([1, 0, len(windows) - 1]))
    one = windows[-1]
    fetched = next(iter(DataLoader(windows, batch_size=3, sampler=[1, 0, len(windows) - 1])))
    for name, tensor in batch.items():
        assert torch.equal(one[name], tensor[2])
        assert torch.equal(fetched[name], tensor)
    with pytest.raises(IndexError):
        windows[len(windows)]


def test_fewer_neighbors_than_the_table_holds_are_its_first():
    store = make_store([30, 30])
    table = make_table(store, k=3, missing=0)
    two = Windows(store, table, window_len=2 * M, num_neighbors=2, retrieved_len=8).batch(np.arange(2))
    three = Windows(store, table, window_len=2 * M, retrieved_len=8).batch(np.arange(2))
    assert two["neighbor_ids"].shape == (2, 2, 2, 8)
    assert torch.equal(two["neighbor_ids"], three["neighbor_ids"][:, :, :2])


def test_neighbors_of_another_store_are_read_from_there():
    queries, store = make_store([9, 9], seed=1), make_store([20, 20, 20], seed=2)
    table = make_table(queries, missing=0, target=store)
    batch = Windows(queries, table, window_len=2 * M, retrieved_len=8, neighbor_store=store).batch(np.array([0]))
    ids, mask = store.values(table.rows[:2], 8)
    assert np.array_equal(batch["neighbor_ids"][0], ids) and np.array_equal(batch["neighbor_mask"][0], mask)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (dict(window_len=10), ["window_len: 10", "m = 4", "8"]),
        (dict(window_len=2), ["window_len: 2", "m = 4"]),
        (dict(window_len=0), ["window_len: 0"]),
        (dict(window_len=8, num_neighbors=3), ["num_neighbors: 3", "1..2", "larger k"]),
        (dict(window_len=8, num_neighbors=0), ["num_neighbors: 0"]),
    ],
)
def test_refusals(arguments, named):
    store = make_store([9, 9])
    with pytest.raises(ValueError) as error:
        Windows(store, make_table(store), **arguments)
    assert all(part in str(error.value) for part in named), error.value


def test_a_table_of_another_store_is_refused():
    with pytest.raises(ValueError, match="6 chunks"):
        Windows(make_store([9, 9]), make_table(make_store([9, 9, 9])), window_len=8)
    store, after = make_store([9, 9, 9]), make_store([9, 9, 9], removed=(1,))
    with pytest.raises(ValueError, match="another state .* run `retro neighbors` again"):
        Windows(after, make_table(store), window_len=8)
    with pytest.raises(ValueError, match="another state"):
        Windows(store, make_table(store, target=store), window_len=8, neighbor_store=after)
    Windows(store, make_table(store, target=after), window_len=8, neighbor_store=after)


# Random neighbors


@settings(max_examples=40)
@given(stores, st.integers(0, 2**40))
def test_random_neighbors_are_of_other_documents_and_missing_where_none_was_found(store, seed):
    table = make_table(store)
    windows = Windows(store, table, window_len=M, random_seed=seed)
    rows = np.array(live_rows(store))
    drawn = windows.neighbor_rows(rows)
    assert np.array_equal(drawn, windows.neighbor_rows(rows)), "the same at every reading"
    assert np.array_equal(drawn[::-1], windows.neighbor_rows(rows[::-1])), "whatever is read with it"
    real = drawn >= 0
    assert not (real & (table.rows[rows] < 0)).any()
    other = store.document_rows(np.where(real, drawn, 0)) != store.document_rows(rows)[:, None]
    assert other[real].all()
    assert (store.chunk_lens(drawn[real]) >= 2).all(), "only rows that an index may return"


def test_random_rows_are_uniform_and_depend_on_the_seed():
    store = make_store([M * 10] * 10)
    rows = np.repeat(np.arange(100), 1)
    drawn = random_rows(store, rows, store.document_rows(rows), 200, seed=3)
    counts = np.bincount(drawn.reshape(-1), minlength=100)
    expected = drawn.size / 100
    assert ((counts - expected) ** 2 / expected).sum() < 160, "chi-squared of 99 degrees: p < 1e-4 above 160"
    assert (random_rows(store, rows, store.document_rows(rows), 200, seed=4) != drawn).mean() > 0.9


# Order, ranks, resume


def order_of(loader: Loader, steps: int) -> list[list[list[int]]]:
    """The first input id of each window, by step and micro-batch: window w of `numbered` starts with token w + 1."""
    return [[(b["input_ids"][:, 0] - 1).tolist() for b in batches] for batches in islice(iter(loader), steps)]


def numbered(num_windows: int) -> Windows:
    """Windows of one chunk whose first token is the number of the window plus one."""
    store = make_store([M] * num_windows)
    store._shards[0].tokens[:, 0] = np.arange(num_windows) + 1
    return Windows(store, window_len=M)


@settings(max_examples=40)
@given(
    num_windows=st.integers(1, 30),
    batch_size=st.integers(1, 4),
    accumulation=st.integers(1, 3),
    world_size=st.integers(1, 4),
    seed=st.integers(0, 2**40),
)
def test_ranks_see_together_what_one_process_sees_with_the_batch_of_all(
    num_windows, batch_size, accumulation, world_size, seed
):
    windows, steps = numbered(num_windows), 4
    alone = order_of(Loader(windows, batch_size * world_size, accumulation=accumulation, seed=seed), steps)
    ranks = [
        order_of(
            Loader(windows, batch_size, accumulation=accumulation, seed=seed, rank=rank, world_size=world_size), steps
        )
        for rank in range(world_size)
    ]
    for step in range(steps):
        for micro in range(accumulation):
            assert sum((ranks[rank][step][micro] for rank in range(world_size)), []) == alone[step][micro]


@settings(max_examples=40)
@given(st.integers(1, 30), st.integers(1, 7), st.integers(0, 2**40))
def test_each_epoch_sees_every_window_once_in_its_own_order(num_windows, batch_size, seed):
    steps = -(-3 * num_windows // batch_size)
    seen = sum(sum(order_of(Loader(numbered(num_windows), batch_size, seed=seed), steps), []), [])
    for epoch in range(3):
        part = seen[epoch * num_windows : (epoch + 1) * num_windows]
        assert sorted(part) == list(range(num_windows))
        assert part == epoch_order(num_windows, seed, epoch).tolist()


@settings(max_examples=40)
@given(st.integers(1, 30), st.integers(1, 7), st.integers(0, 6), st.integers(0, 3))
def test_a_loader_goes_on_exactly_from_a_saved_position(num_windows, batch_size, stop_at, prefetch):
    windows = numbered(num_windows)
    undisturbed = order_of(Loader(windows, batch_size, seed=1), 10)
    first = Loader(windows, batch_size, seed=1, prefetch=prefetch)
    before = order_of(first, stop_at)
    saved = json.loads(json.dumps(first.position))
    after = order_of(Loader(windows, batch_size, seed=1, position=saved), 10 - stop_at)
    assert before + after == undisturbed


def kept_of(windows: Windows, drop: float, steps: int) -> np.ndarray:
    """Which of the chunks that have neighbors keep them, in the order of the stream; all else is as without drops."""
    found = []
    dropping, whole = (iter(Loader(windows, 2, seed=3, drop_neighbors=p)) for p in (drop, 0.0))
    for (batch,), (undropped,) in islice(zip(dropping, whole, strict=True), steps):
        mask = undropped.pop("neighbor_mask")
        kept = batch["neighbor_mask"].flatten(2).any(-1)  # [b, l]
        assert torch.equal(batch.pop("neighbor_mask"), mask & kept[..., None, None])
        assert batch.keys() == undropped.keys() and all(torch.equal(batch[name], undropped[name]) for name in batch)
        found.append(kept[mask.flatten(2).any(-1)].numpy())
    return np.concatenate(found)


def test_dropped_neighbors_are_of_whole_chunks_as_often_as_asked():
    store = make_store([M * 4] * 40)
    windows = Windows(store, make_table(store), window_len=2 * M)
    batch = Loader(windows, 20, seed=3, drop_neighbors=0.5).step({"epoch": 0, "window": 0})[0]
    of_window = batch["neighbor_mask"].flatten(2).any(-1)  # [b, l]
    assert (of_window.any(-1) & ~of_window.all(-1)).any(), "single chunks, not windows"
    kept = kept_of(windows, 0.3, steps=400)
    deviation = (0.3 * 0.7 / len(kept)) ** 0.5
    assert abs((~kept).mean() - 0.3) < 4 * deviation


def _masks_by_window(batches: list[dict]) -> list[tuple]:
    """Tokens of a window, and whether it keeps its neighbors."""
    return [
        (tuple(ids.tolist()), bool(m.any()))
        for b in batches
        for ids, m in zip(b["input_ids"], b["neighbor_mask"], strict=True)
    ]


def test_each_epoch_drops_anew():
    store = make_store([M * 4] * 3)
    windows = Windows(store, make_table(store, missing=0.0), window_len=M)
    masks = [
        {row: mask for batch in islice(iter(loader), 12) for row, mask in _masks_by_window(batch)}
        for loader in (
            Loader(windows, 1, seed=3, drop_neighbors=0.5, position={"epoch": epoch, "window": 0}) for epoch in (0, 1)
        )
    ]
    assert masks[0].keys() == masks[1].keys() and masks[0] != masks[1]


@pytest.mark.parametrize("world_size", [1, 2])
def test_what_is_dropped_depends_on_the_place_in_the_stream_alone(world_size):
    store = make_store([M * 4] * 40)
    windows = Windows(store, make_table(store), window_len=2 * M)
    position = {"epoch": 1, "window": 6}
    given = dict(seed=3, drop_neighbors=0.5, world_size=world_size)
    (alone,) = Loader(windows, 4, seed=3, drop_neighbors=0.5).step(position)
    ranks = [Loader(windows, 4 // world_size, rank=rank, **given).step(position)[0] for rank in range(world_size)]
    assert torch.equal(torch.cat([batch["neighbor_mask"] for batch in ranks]), alone["neighbor_mask"])


def test_the_order_depends_on_seed_and_epoch():
    orders = {tuple(epoch_order(50, seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_a_read_that_fails_raises_in_the_loop():
    windows = numbered(5)
    windows.batch = lambda chosen: (_ for _ in ()).throw(OSError("disk gone"))
    with pytest.raises(OSError, match="disk gone"):
        next(iter(Loader(windows, 2, seed=0)))
