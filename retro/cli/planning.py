"""The verb that looks ahead: plan."""

from __future__ import annotations

from typing import Any, Unpack

from retro.cli.options import argument, options
from retro.cli.shared import JsonFile, write_json
from retro.planning import PlanSettings, make_plan


def plan(
    inputs: argument(PlanSettings, "inputs"),
    /,
    *,
    json: JsonFile = None,
    **settings: Unpack[options(PlanSettings, without=["inputs"])],
) -> None:
    """Say what a datastore will cost before it is built, and with --model what training on it costs.

    Disk, memory, operations and hours follow from a sample of the documents and from how fast this machine embeds it.
    """
    result = make_plan(PlanSettings(inputs, **settings))
    for line in lines_of(result):
        print(line)
    write_json(json, result)


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
