"""What the figures of a report do not show, drawn from the figures themselves."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from retro.evaluation.bits import COLUMNS
from retro.evaluation.cells import amount, change, figure, gain_over, percent, share
from retro.evaluation.report.files import Result, StoreRecord
from retro.evaluation.report.samples import attribution_from_json
from retro.evaluation.tables import figures_of
from retro.retrieval.search.searchers import approximate_parts
from retro.sampling.terminal import shown_runs

FEW_DOCUMENTS, FEW_CHUNKS, FEW_EXAMPLES = 10, 100, 100  # below these an interval says little


def caveats_of(results: Sequence[Result], stores: Sequence[StoreRecord] = ()) -> list[tuple[str, list[Result]]]:
    """Sentences, each with the results that it is true of. stores: with the recall of their indexes."""
    said: dict[str, list[Result]] = {}
    makers = {"evaluate": _of_bits, "leakage": _of_leakage, "sweep": _of_sweep, "baselines": _of_baselines}
    makers |= {"task": _of_task, "lm_eval": _of_lm_eval, "generate": _of_samples}
    for result in results:
        sentences = (*makers[result.kind](result.value), *_of_reading(result.value, stores))
        for sentence in dict.fromkeys(sentences):
            said.setdefault(sentence, []).append(result)
    return list(said.items())


def _of_bits(value: dict[str, Any]) -> Iterator[str]:
    bpb, little, ends = value["bpb"], value["bpb_little_overlap"], value.get("interval", {})
    if "retro_on" not in bpb:
        yield "Only a plain LM was measured: nothing here is about retrieval."
        return
    for other in (column for column in ("lm", "retro_off") if column in bpb):
        yield from _copying(bpb, little, other, value["chunks_little_overlap"], value["chunks"])
        if other in value.get("gain", {}):
            yield from _unsure(f"What RETRO[ON] saves against {COLUMNS[other]}", value["gain"][other])
        elif _overlap(ends.get("retro_on"), ends.get(other)):
            yield (
                f"The 95% intervals of RETRO[ON] and {COLUMNS[other]} overlap. They are of each figure alone; "
                "whether the difference is sure is what the intervals of retro leakage say."
            )
    yield from _against_random(bpb)
    if "lm" not in bpb:
        yield "No plain LM was measured beside the RETRO: what reading neighbors costs RETRO[OFF] is not known."
    elif bpb["lm"] < bpb.get("retro_off", -math.inf):
        yield (
            f"RETRO[OFF] is {change(gain_over(bpb['retro_off'], bpb['lm']))} LM: part of what RETRO[ON] gains over "
            "RETRO[OFF] only makes up for that."
        )
    if not ends:
        yield "The bits per byte carry no intervals: how far they depend on the choice of documents is not known."


def _copying(bpb: dict, little: dict, other: str, few: int, chunks: int) -> Iterator[str]:
    gain, rest = (gain_over(of["retro_on"], of[other]) for of in (bpb, little))
    name = COLUMNS[other]
    if gain <= 0:
        both = f"{figure(bpb['retro_on'])} against {figure(bpb[other])} bits per byte"
        yield f"RETRO[ON] is no better than {name} ({both})."
    elif rest <= gain / 2:
        part = "there is no gain there: what is gained is copied" if rest <= 0 else "most of the gain is copying"
        yield (
            f"Over the {few:,} of {chunks:,} chunks with little overlap with their neighbors (r(C) at most 12.5%), "
            f"RETRO[ON] is {change(rest)} {name}, over all chunks {change(gain)}: {part}."
        )
    if 0 < few < FEW_CHUNKS:
        yield f"Only {few:,} chunks have little overlap with their neighbors: what is said of them is vague."


def _against_random(bpb: dict[str, float]) -> Iterator[str]:
    random, on = bpb.get("retro_on_random"), bpb["retro_on"]
    if random is not None and random <= on:
        both = f"{figure(random)} against {figure(on)} bits per byte"
        yield (
            f"Random neighbors are as good as those that were found ({both}): what RETRO[ON] does is not owed to the "
            "search."
        )


def _of_leakage(value: dict[str, Any]) -> Iterator[str]:
    least, whole = value["points"][0], value["points"][-1]
    if "retro_on" not in whole["bpb"]:
        yield "Only a plain LM was measured: nothing here is about retrieval."
        return
    for point in (whole, least) if least is not whole else (whole,):
        where = f"over the {point['chunks']:,} chunks with r(C) at most {share(point['alpha'])}"
        for column in (column for column in ("lm", "retro_off") if column in point["gain"]):
            yield from _unsure(f"What RETRO[ON] saves against {COLUMNS[column]}, {where}", point["gain"][column])
    yield from _against_random(whole["bpb"])
    if least["chunks"] < FEW_CHUNKS:
        few = f"{least['chunks']:,} chunks have r(C) at most {share(least['alpha'])}"
        yield f"Only {few}: what is said of them is vague."
    if value.get("documents_in_store"):
        yield (
            f"{value['documents_in_store']:,} of the {value['documents']:,} documents have the id of a document in the "
            "store: the model may have been trained on them."
        )


def _of_sweep(value: dict[str, Any]) -> Iterator[str]:
    x = value["x"]
    curve = sorted((point for point in value["curve"] if point["column"] == "retro_on"), key=lambda point: point[x])
    if not curve:
        yield f"The sweep over {value['sweep']} holds no RETRO[ON]: nothing in it is about retrieval."
        return
    best, last = min(curve, key=lambda point: point["bpb"]), curve[-1]
    if len(curve) > 1 and best is not last:
        yield (
            f"The sweep over {value['sweep']}: more is not better throughout. RETRO[ON] is best at {amount(best[x])} "
            f"({value['xlabel']}), {figure(best['bpb'])} bits per byte, at {amount(last[x])} {figure(last['bpb'])}."
        )
    if "gain" in last and value["sweep"] != "datastore":
        where = f"at {amount(last[x])} ({value['xlabel']})"
        yield from _unsure(
            f"What RETRO[ON] saves against RETRO[OFF], {where}", [last["gain"], last["gain_low"], last["gain_high"]]
        )
    if value["sweep"] == "datastore":
        yield f"The band of the datastore's sweep is the {value['band']}: no interval over documents."


def _of_baselines(value: dict[str, Any]) -> Iterator[str]:
    first, *others = value["rows"]
    several = len({row["model"] for row in others if row["method"].startswith("retro")}) > 1
    name = lambda row: row["label"] + f" of {row['model']}" * several + f", k = {row['k']}" * bool(row["k"])  # noqa: E731
    unsure = [name(row) for row in others if not _excludes_0(row["gain"][1:])]
    if unsure:
        yield f"Not told apart from {first['label']} (the interval holds 0, or is not known): {'; '.join(unsure)}."
    gone = [name(row) for row in others if row["gain"][0] > 0 and row["gain_little_overlap"][0] <= 0]
    if gone:
        yield (
            f"Better than {first['label']} over all chunks, but not over those with little overlap with their "
            f"neighbors: {'; '.join(gone)}."
        )
    if value["near_copies"]:
        yield f"{len(value['near_copies']):,} of {value['documents']:,} documents are near copies of one of the store."
    methods = {row["method"] for row in value["rows"]}
    for row in others:
        if row["method"] == "retro_on":
            yield from _against_random({one["method"]: one["bpb"] for one in others if _stand_beside(one, row)})
    if "retro_on_oracle" in methods:
        yield "The oracle's neighbors are chosen by looking at the text that is scored: a bound, no method."
    if "replug" in methods and not value["validation_tokens"]:
        yield "REPLUG's temperature was not chosen on validation text."


def _stand_beside(one: dict[str, Any], row: dict[str, Any]) -> bool:
    return (one["model"], one["k"]) == (row["model"], row["k"])


def _of_task(value: dict[str, Any]) -> Iterator[str]:
    count = value.get("examples", value.get("questions"))
    if count is not None and count < FEW_EXAMPLES:
        yield f"The task {value['task']} has only {count:,} examples."
    for name in (name for name in figures_of(value) if name in ("accuracy_gain", "saved")):
        for column, cell in value[name].items():
            against = f"What RETRO[ON] gains over {COLUMNS.get(column, column)}, task {value['task']}"
            yield from _unsure(against, [cell["value"], *cell["interval"]])
    if "retro_on" in value.get("accuracy", {}) and value.get("read_neighbors", 1) < 1:
        yield f"Only {percent(value['read_neighbors'])} of the last words could read a neighbor (task {value['task']})."
    if value.get("decontaminate") is False:
        yield f"Neighbors that hold the text of the examples word for word were not left out (task {value['task']})."


def _of_lm_eval(value: dict[str, Any]) -> Iterator[str]:
    counts = {name: one.get("effective") for name, one in value.get("n-samples", {}).items()}
    few = [name for name, count in counts.items() if isinstance(count, int) and count < FEW_EXAMPLES]
    if few:
        yield f"Fewer than {FEW_EXAMPLES} examples of lm_eval's tasks: {', '.join(few)}."
    yield "lm_eval's standard errors are of each figure alone, not of a difference between two."


def _of_samples(value: dict[str, Any]) -> Iterator[str]:
    texts = [attribution_from_json(text) for text in value["texts"]]
    chunks = [chunk for text in texts if text.retrieved for chunk in text.chunks[1:]]
    without = sum(not chunk.neighbors for chunk in chunks)
    if without:
        yield f"{without:,} of {len(chunks):,} chunks of the samples had no neighbor to read."
    written = sum(len(text.tokens) - text.num_prompt_tokens for text in texts)
    copied = sum(_copied_tokens(chunk) for chunk in chunks)
    if written and copied:
        yield (
            f"{share(round(copied / written, 3))} of the {written:,} generated tokens of the samples stand in a run "
            "that a neighbor holds too. A run in common is no proof that it was copied."
        )
    yield f"{len(texts):,} samples show what a model may write; they measure nothing."


def _copied_tokens(chunk: Any) -> int:
    return len({token for _, start, stop in shown_runs(chunk) for token in range(start, stop)})


def _of_reading(value: dict[str, Any], stores: Sequence[StoreRecord]) -> Iterator[str]:
    """Of documents, windows, index and chunks without neighbors."""
    documents, window = value.get("documents"), value.get("window_len")
    if documents is not None and documents < FEW_DOCUMENTS:
        yield (
            "Only 1 document: there is no interval."
            if documents == 1
            else f"Only {documents} documents: the bootstrap over so few gives intervals that are too narrow."
        )
    if documents and window and value.get("tokens", 0) > documents * window:
        mean, stride = value["tokens"] // documents, value.get("stride")
        least = (
            "" if stride is None else f": a token sees at least {window - stride:,} tokens before it, if there are any"
        )
        yield f"The documents, {mean:,} tokens on average, are cut into windows of {window:,}{least}."
    if value.get("chunks_without_neighbors"):
        yield f"{value['chunks_without_neighbors']:,} of {value.get('chunks', 0):,} chunks found no neighbor."
    yield from _of_index(value, stores)


def _of_index(value: dict[str, Any], stores: Sequence[StoreRecord]) -> Iterator[str]:
    kinds = sorted(approximate_parts(value.get("index") or ""))
    of_store = next((one.recall for one in stores if one.fingerprint == value.get("store_fingerprint")), {})
    recalls = [value.get("index_recall", of_store.get(kind, {}).get("recall")) for kind in kinds]
    source = f"The neighbors come from an approximate index ({', '.join(kinds)})"
    if None in recalls:
        yield f"{source} whose recall these files do not say."
    elif (recall := min(recalls, default=1)) < 1:
        yield (
            f"{source} that finds {percent(recall)} of what exact search finds, measured with the store's own chunks "
            "as queries."
        )


def _unsure(what: str, gain: Sequence[float]) -> Iterator[str]:
    """A sentence if the interval of a gain does not lie above 0."""
    value, low, high = gain
    if math.isnan(value) or low > 0:
        return
    if math.isnan(low):
        yield f"{what}: {percent(value)}, without an interval."
    elif high < 0:
        yield f"{what}: {percent(value)} ({percent(low)} to {percent(high)}): it is worse."
    else:
        yield f"{what}: {percent(value)} ({percent(low)} to {percent(high)}): the interval holds 0, no gain is sure."


def _excludes_0(ends: Sequence[float]) -> bool:
    low, high = ends
    return low > 0 or high < 0


def _overlap(one: Sequence[float] | None, other: Sequence[float] | None) -> bool:
    if one is None or other is None:
        return False
    return max(one[0], other[0]) <= min(one[1], other[1])
