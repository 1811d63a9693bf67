"""Rankings of documents for queries, in the files of TREC, BEIR and MTEB, and how good they are.

    queries    JSON Lines {"_id" or "id", "text" or "question"} (BEIR), or rows of id and text (TREC, MS MARCO)
    qrels      "query 0 document grade" a line (TREC), or query-id, corpus-id, score in TSV (BEIR)
    run        "query Q0 document rank score name" a line (TREC), or in .json {query: {document: score}} (BEIR, MTEB)

A document stands where the best of its chunks stands.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retro.common.extras import check_installed
from retro.common.files import write_text
from retro.evaluation.tasks.files import read_records
from retro.text.compression import open_bytes

Ranking = dict[str, dict[str, float]]  # by query and document


def read_queries(path: str | Path) -> list[tuple[str, str]]:
    """The id and the text of every query; a .txt file has one text a line. ValueError for a query without text."""
    if Path(path).suffix == ".txt":
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        found = [(str(number), line) for number, line in enumerate(lines, start=1) if line.strip()]
    else:
        found = []
        for place, record in read_records(path, columns=("id", "text")):
            text = record.get("text") or record.get("question")
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f'{place}: no text in "text" or "question"; write it, or leave the query out.')
            found.append((str(record.get("_id") or record.get("id") or len(found)), text))
    if len(dict(found)) < len(found) or not found:
        raise ValueError(f"{path} holds {len(found)} queries under {len(dict(found))} ids; give each its own.")
    return found


def ranking(sources: Sequence[Any], scores: Sequence[float]) -> dict[str, float]:
    """The documents of a query's neighbors with the score of each one's best chunk; both are best first."""
    found: dict[str, float] = {}
    for source, score in zip(sources, scores, strict=True):
        if source is not None:
            found.setdefault(source.document_id, float(score))
    return found


def write_run(path: str | Path, run: Ranking, name: str = "retro") -> None:
    """Write a run in the form that the file's ending says; ValueError for an id that TREC's form cannot hold."""
    if Path(path).suffix == ".json":
        write_text(path, json.dumps(run, ensure_ascii=False, indent=1) + "\n")
        return
    lines = []
    for query, found in run.items():
        for rank, (document, score) in enumerate(found.items(), start=1):
            if len(f"{query} {document}".split()) != 2:
                raise ValueError(f"{path} cannot hold ids with a space ({document!r}); let it end in .json.")
            lines.append(f"{query} Q0 {document} {rank} {score:.6g} {name}\n")
    write_text(path, "".join(lines))


def read_qrels(path: str | Path) -> dict[str, dict[str, int]]:
    """The grade of every document that is judged for a query; ValueError for a line that is neither form's."""
    found: dict[str, dict[str, int]] = {}
    with open_bytes(path) as file:
        lines = file.read().decode("utf-8-sig").splitlines()
    for number, line in enumerate(lines, start=1):
        parts = next(csv.reader([line], delimiter="\t")) if "\t" in line else line.split()
        if not parts or (number == 1 and parts[-1] == "score"):
            continue
        try:
            query, *_, document, grade = parts
            found.setdefault(query, {})[document] = int(float(grade))
        except ValueError:
            said = f"{path}, line {number}: {line[:80]!r} is no judgement; write query, document and grade."
            raise ValueError(said) from None
    if not found:
        raise ValueError(f"{path} holds no judgement; give a file of query, document and grade.")
    return found


def ranking_measures(
    qrels: Mapping[str, Mapping[str, int]], run: Ranking, ks: Sequence[int], seed: int = 0
) -> dict[str, dict[str, Any]]:
    """nDCG@10, RR@10 and, for each k, recall@k over the queries that have judgements, by ir_measures.

    Gives {measure: {"value", "interval"}}.
    """
    check_installed("ir_measures", "measuring a ranking")
    import ir_measures
    from ir_measures import RR, R, nDCG

    from retro.evaluation.intervals import mean
    from retro.evaluation.tasks.results import with_interval

    asked = [nDCG @ 10, RR @ 10, *(R @ k for k in ks)]
    judged = {query: dict(grades) for query, grades in qrels.items()}
    found = {measure: dict.fromkeys(judged, 0.0) for measure in asked}  # a query that found nothing has 0
    for one in ir_measures.iter_calc(asked, judged, {query: run[query] for query in judged if run.get(query)}):
        found[one.measure][one.query_id] = one.value
    means = {measure: mean(np.array(list(values.values())), seed) for measure, values in found.items()}
    return {str(measure): with_interval(*value) for measure, value in means.items()}
