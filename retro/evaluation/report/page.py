"""The page: parts of results over the same text, store and tokens, what they do not show, samples, settings.

Every text goes through a template that escapes it. The page's policy lets nothing load, and nothing run or count but
its own styles and script, by their hashes; pictures are part of the page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from retro.evaluation.cells import plain_cell
from retro.evaluation.leakage import told_examples
from retro.evaluation.report.caveats import caveats_of
from retro.evaluation.report.files import ReportInputs, Result, StoreRecord
from retro.evaluation.report.pictures import picture_of, picture_of_bits, picture_of_losses
from retro.evaluation.report.samples import attribution_from_json
from retro.evaluation.report.tables import data_of, model_of, overview, store_of, title_of
from retro.evaluation.tables import answers_tables, bits_table, gains_table, tables_of
from retro.sampling import html_fragment, visible
from retro.sampling.page import content_policy, page_script, page_style, template_environment
from retro.version import __version__

_FOLDER = Path(__file__).parent
_LONGEST = 200  # characters of a setting


@dataclass(frozen=True)
class Basis:
    """What figures must have in common to stand in one table: data, store, bytes and tokens scored, and the task."""

    data: tuple[str, ...]
    store: str
    counts: tuple[tuple[str, Any], ...]

    @property
    def title(self) -> str:
        count = lambda number, name: f"{number:,} {name.removesuffix('s') if number == 1 else name}"  # noqa: E731
        said = (count(value, name) if isinstance(value, int) else f"{name}: {value}" for name, value in self.counts)
        names = ", ".join(Path(name).name for name in self.data)
        return f"{names}: {', '.join(said)}" if names else ", ".join(said)


def report_page(runs: ReportInputs) -> str:
    """One HTML page of everything that was read."""
    results = [result for result in runs.results if result.kind != "generate"]
    samples = [result for result in runs.results if result.kind == "generate"]
    numbers = {result.name: f"r{place}" for place, result in enumerate(runs.results, start=1)}
    parts = [_part(basis, members, runs.stores) for basis, members in grouped(results).items()]
    return (
        _environment()
        .get_template("report.html")
        .render(
            version=__version__,
            made_at=datetime.now().astimezone().isoformat(" ", "minutes"),
            runs=runs,
            numbers=numbers,
            overview=overview(runs.results),
            kinds=[title_of(result) for result in runs.results],
            parts=parts,
            caveats=[(part["title"], part["caveats"]) for part in parts if part["caveats"]]
            + [("Samples", caveats_of(samples, runs.stores))] * bool(samples),
            losses=picture_of_losses(runs.models),
            models=[_model(model) for model in runs.models],
            stores=[_store(store) for store in runs.stores],
            samples=[_sample(result, place) for place, result in enumerate(samples, start=1)],
            settings=[(result, _settings(result.value)) for result in runs.results],
            styles=[Markup(text) for text in (page_style(), _style())],
            script=Markup(page_script()),
            policy=_policy(),
        )
        .lstrip()
    )


def grouped(results: Sequence[Result]) -> dict[Basis, list[Result]]:
    """Results by what they were measured on, in the order of the first of each."""
    groups: dict[Basis, list[Result]] = {}
    for result in results:
        groups.setdefault(basis_of(result.value), []).append(result)
    return groups


def basis_of(value: dict[str, Any]) -> Basis:
    names = ("task", "documents", "examples", "questions", "bytes", "tokens")
    counts = [(name, value[name]) for name in names if isinstance(value.get(name), (int, str))]
    counts += [("tasks", ", ".join(value["results"]))] if "results" in value else []
    return Basis(
        tuple(value.get("data") or ()), value.get("store_fingerprint") or value.get("store") or "", tuple(counts)
    )


def _part(basis: Basis, members: list[Result], stores: Sequence[StoreRecord]) -> dict[str, Any]:
    """What the template shows of results on one basis: bits per byte in one table, the others one by one."""
    bits = [result for result in members if result.kind == "evaluate"]
    views = []
    if bits:
        title = "What RETRO[ON] gains: "
        gains = [replace(gains_table(result.value), title=title + result.name, note="") for result in bits]
        tables = [bits_table([(result.name, result.value) for result in bits]), *(one for one in gains if one.records)]
        views.append(dict(results=bits, tables=tables, picture=picture_of_bits(bits), examples=[]))
    for result in (result for result in members if result.kind != "evaluate"):
        tables = [*tables_of(result.value), *answers_tables(result.value)]
        examples = told_examples(result.value) if result.kind == "leakage" else []
        views.append(dict(results=[result], tables=tables, picture=picture_of(result), examples=examples))
    first = members[0].value
    about = {"title": basis.title, "data": data_of(first), "store": store_of(first)}
    return about | {"views": views, "caveats": caveats_of(members, stores)}


def _sample(result: Result, place: int) -> dict[str, Any]:
    texts = [attribution_from_json(text) for text in result.value["texts"]]
    fragments = [Markup(html_fragment(text, f"s{place}t{number}")) for number, text in enumerate(texts, start=1)]
    about = {"model": model_of(result.value), "store": store_of(result.value), "file": result.name}
    with_gains = any(text.gains is not None for text in texts)
    return {"name": result.name, "about": about, "fragments": fragments, "with_gains": with_gains}


def _model(model: Any) -> dict[str, Any]:
    logged = [line for line in model.metrics if "loss" in line]
    last = logged[-1] if logged else {}
    made_with = {name: model.provenance.get(name) for name in ("library_version", "store", "store_fingerprint")}
    facts = {"steps": last.get("step"), "tokens": last.get("tokens"), "last loss": last.get("loss"), **made_with}
    checked_at = [line for line in model.metrics if "bits_per_byte_off" in line]
    for mode in ("on", "off"):
        name = f"bits_per_byte_{mode}"
        facts |= {f"validation, bits per byte, {mode}": line.get(name) for line in checked_at[-1:]}
    return {
        "name": model.name,
        "facts": [(name, plain_cell(value)) for name, value in facts.items() if value is not None],
        "config": _flat(model.config),
        "settings": model.settings,
    }


def _store(store: Any) -> dict[str, Any]:
    facts = {"fingerprint": store.fingerprint, "embedder": store.embedder, "inputs": store.inputs, **store.counts}
    for kind, recall in store.recall.items():
        facts[f"recall@{recall['k']} of {kind}"] = recall["recall"]
    return {"name": store.name, "facts": [(name.replace("_", " "), plain_cell(value)) for name, value in facts.items()]}


def _settings(value: dict[str, Any]) -> list[tuple[str, str]]:
    """Everything of a result that is no figure: its single values, and those of its settings and versions."""
    figures = ("interval", "bpb", "bpb_little_overlap", "gain", "gain_little_overlap", "off_below_lm")
    return _flat({name: one for name, one in value.items() if name not in figures})


def _flat(record: dict[str, Any]) -> list[tuple[str, str]]:
    flat = []
    for name, value in record.items():
        if name in ("settings", "versions", "seconds", "seconds_of_stage") and isinstance(value, dict):
            flat += [(f"{name}: {inner}", plain_cell(one)[:_LONGEST]) for inner, one in value.items()]
        elif not isinstance(value, (dict, list)) or _is_plain(value):
            flat.append((name, plain_cell(value)[:_LONGEST]))
    return flat


def _is_plain(value: Any) -> bool:
    return isinstance(value, list) and not any(isinstance(one, (dict, list)) for one in value)


@cache
def _style() -> str:
    return (_FOLDER / "report.css").read_text(encoding="utf-8")


def _policy() -> str:
    return content_policy([page_style(), _style()], [page_script()], "img-src data:; ")


@cache
def _environment() -> Environment:
    """Every text that is no markup is made visible, then escaped."""
    return template_environment(_FOLDER, finalize=lambda value: visible(value) if type(value) is str else value)
