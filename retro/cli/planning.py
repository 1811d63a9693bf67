"""The verb that looks ahead: plan."""

from __future__ import annotations

import argparse
from typing import Any

from retro.cli.shared import KINDS, add_json, verb, write_json


def add_plan(verbs: Any) -> None:
    parser = verb(verbs, "plan", plan, "what a datastore, or training on one, will cost")
    parser.add_argument("inputs", metavar="INPUT", nargs="+", help="documents, as for retro build; a part will do")
    about = "Hugging Face name or folder, or package:NAME, as for retro build"
    parser.add_argument("--tokenizer", required=True, metavar="T", help=about)
    parser.add_argument("--embedder", default="minilm", metavar="E", help="as for retro build; default: minilm")
    parser.add_argument("--chunk-len", type=int, default=64, metavar="M", help="tokens of a chunk; default: 64")
    parser.add_argument("--text-field", default="text", metavar="NAME", help="field or column that holds the text")
    parser.add_argument("--key-dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--index", default="auto", metavar="I", help=f"none, or one of {KINDS.split(', tfidf')[0]}")
    about = "tokens of the corpus that the inputs are a part of, such as 1e12; default: those of the inputs"
    parser.add_argument("--tokens", type=float, metavar="N", help=about)
    about = "a model to train once on these tokens: 172m, 425m, 1.5b or 7.5b, each alone or with -modern behind it, "
    parser.add_argument("--model", metavar="PRESET", help=about + "or a folder with config.json")
    about = "TFLOP/s that all machines together reach; default: what embedding reaches here, measured for ten seconds"
    parser.add_argument("--tflops", type=float, metavar="X", help=about)
    add_json(parser)


def plan(args: argparse.Namespace) -> int:
    """Say what a datastore will cost before it is built: disk, memory, operations and hours, from a sample of the
    documents and from how fast this machine embeds it; with --model also what training costs."""
    from dataclasses import fields

    from retro.planning import PlanSettings, make_plan

    result = make_plan(PlanSettings(**{field.name: getattr(args, field.name) for field in fields(PlanSettings)}))
    for line in lines_of(result):
        print(line)
    write_json(args.json, result)
    return 0


def lines_of(result: dict[str, Any]) -> list[str]:
    """A plan to read."""
    corpus, index, model = result["corpus"], result["index"], result["model"]
    shown = ["{documents:,} documents, {bytes:,} bytes, {tokens:,} tokens, {chunks:,} chunks".format(**corpus)]
    if corpus["share_read"] < 1:
        shown.append(f"estimated from {corpus['share_read']:.2%} of the inputs")
    shown += ["disk", *_rows(result["disk"], _bytes), "memory", *_rows(result["memory"], _bytes)]
    if index["layout"]:
        lists = f", {index['layout']['lists']:,} lists" if index["layout"]["lists"] else ""
        shown.append(f"index {index['kind']}: {index['segments']:,} segments of {index['rows']:,} rows, ")
        shown[-1] += f"codes {index['layout']['codes']}{lists}"
    if model:
        shown.append("model: {parameters:,} parameters, {forward_flops_per_token:.3g} FLOP a token".format(**model))
    shown += ["operations", *_rows(result["flops"], lambda count: f"{count:.3g} FLOP")]
    if result["hours"] is None:
        return [*shown, "no hours: nothing is embedded here; give --tflops"]
    shown.append(f"time at {result['flops_per_second'] / 1e12:,.3g} TFLOP/s")
    return shown + _rows(result["hours"], _duration)


def _rows(values: dict[str, Any], form: Any) -> list[str]:
    return [f"  {name.replace('_', ' '):34}{form(value):>16}" for name, value in values.items()]


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000:
            return f"{count:,.0f} B" if unit == "B" else f"{count:,.2f} {unit}"
        count /= 1000
    return f"{count:,.2f} PB"


def _duration(hours: float) -> str:
    if hours < 1 / 60:
        return f"{3600 * hours:.1f} s"
    if hours < 1:
        return f"{60 * hours:.1f} min"
    return f"{hours:,.1f} h" if hours < 1000 else f"{hours / 24:,.0f} days"
