"""The verb that looks ahead: plan."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from retro.cli.shared import KINDS, add_json, verb, write_json

NUMBERS = "as 10k, 1.5M, 28B or 1.8T"
SIZES = "as 512M, 40GB, 24GiB or 1.5T"


def add_plan(verbs: Any) -> None:
    parser = verb(verbs, "plan", plan, "what a datastore, or training on one, will cost")
    parser.add_argument("inputs", metavar="INPUT", nargs="*", help="documents, as for retro build, to take the size of")
    numbers = parser.add_argument_group("the corpus in numbers, instead of inputs")
    for name in ("documents", "tokens", "chunks"):
        numbers.add_argument(f"--{name}", metavar="N", help=NUMBERS)
    numbers.add_argument("--bytes", metavar="SIZE", help=f"of text; {SIZES}")
    numbers.add_argument("--vocab-size", metavar="N", help="of the tokenizer; default: 32,000")
    _add_store(parser.add_argument_group("the datastore, as for retro build"))
    _add_workers(parser.add_argument_group("who builds it"))
    _add_training(parser.add_argument_group("training on it (--model)"))
    times = parser.add_argument_group("constants of this machine")
    times.add_argument(
        "--calibrate", action="store_true", help="measure them (a minute or two), with the inputs if there are some"
    )
    times.add_argument("--calibration", metavar="FILE", help="where they are; default: in the user's cache folder")
    parser.add_argument("--seed", type=int, default=0, help="of the sample of the inputs")
    add_json(parser)


def _add_store(group: Any) -> None:
    group.add_argument("--tokenizer", metavar="T", help="needed with inputs")
    group.add_argument("--embedder", default="minilm", metavar="E", help="default: minilm")
    group.add_argument("--key-dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    group.add_argument("--chunk-len", type=int, default=64, metavar="M", help="tokens of a chunk")
    group.add_argument("--text-field", default="text", metavar="NAME", help="field or column that holds the text")
    group.add_argument("--index", default="auto", metavar="I", help=f"none, or one of {KINDS.split(', tfidf')[0]}")
    group.add_argument("--shard-chunks", default="1M", metavar="N", help=f"chunks of a shard; {NUMBERS}")
    group.add_argument("--k", type=int, default=2, metavar="N", help="of the neighbor table; 0 for none")


def _add_workers(group: Any) -> None:
    group.add_argument("--workers", type=int, metavar="N", help="processes; default: as many as were calibrated")
    group.add_argument("--gpus", type=int, default=0, metavar="N", help="embed (or train) on so many GPUs")
    group.add_argument("--gpu-tflops", type=float, metavar="X", help="TFLOP/s of one, in bfloat16")
    group.add_argument("--mfu", type=float, default=0.4, metavar="X", help="the share of that which is reached")
    group.add_argument("--memory", metavar="SIZE", help=f"of a machine that builds the index; {SIZES}")


def _add_training(group: Any) -> None:
    group.add_argument(
        "--model",
        metavar="PRESET",
        help="172m, 425m, 1.5b or 7.5b, each alone or with -modern behind it, or a folder with config.json",
    )
    group.add_argument("--train-tokens", metavar="N", help=f"default: those of the corpus; {NUMBERS}")
    group.add_argument("--gpu-memory", metavar="SIZE", help=f"of one GPU; {SIZES}")
    group.add_argument("--gpus-per-node", type=int, default=8, metavar="N")
    group.add_argument("--batch-size", type=int, default=1, metavar="N", help="windows that a GPU runs at once")
    group.add_argument("--no-checkpointing", action="store_true", help="keep all activations")


def plan(args: argparse.Namespace) -> int:
    """Say what a datastore will cost before it is built: disk, memory, operations, index and hours; with --model also
    what training on it costs. Times come from constants measured on this machine by --calibrate."""
    from retro.retrieval.planning.calibration import Calibration, calibration_file

    numbers = [name for name in ("documents", "tokens", "chunks", "bytes") if getattr(args, name)]
    _check(args, numbers)
    file = Path(args.calibration) if args.calibration else calibration_file()
    constants = None
    if args.calibrate:
        constants = _calibrate(args, file)
        if not args.inputs and not numbers:
            write_json(args.json, vars(constants))
            return 0
    elif args.calibration or file.is_file():
        constants = Calibration.load(file)
    result = _planned(args, numbers, constants)
    for line in lines_of(result):
        print(line)
    write_json(args.json, result)
    return 0


def _check(args: argparse.Namespace, numbers: list[str]) -> None:
    if args.inputs and numbers:
        raise ValueError(f"inputs and --{numbers[0]} are both given; a plan is for one of them")
    if args.inputs and not args.tokenizer:
        raise ValueError("--tokenizer is missing; inputs are measured with the tokenizer of the store")
    if args.inputs and args.vocab_size:
        raise ValueError("--vocab-size is given with inputs, whose --tokenizer tells it; leave it out")
    if not args.inputs and not numbers and not args.calibrate:
        raise ValueError("there is nothing to plan; give inputs, --tokens, --chunks or --bytes, or --calibrate")
    given = [name for name in ("train_tokens", "gpu_memory") if getattr(args, name)]
    if given and not args.model:
        raise ValueError(f"--{given[0].replace('_', '-')} is about training; name the model with --model")
    if args.model and not (args.gpus and args.gpu_tflops and args.gpu_memory):
        raise ValueError("a plan of training needs --gpus, --gpu-tflops and --gpu-memory; give all three")


def _calibrate(args: argparse.Namespace, file: Path) -> Any:
    from retro.retrieval.planning.calibration import calibrate

    constants = calibrate(
        args.inputs or None,
        args.tokenizer,
        args.embedder,
        args.workers,
        args.chunk_len,
        report=lambda what: print(f"measuring: {what}", flush=True),
    )
    constants.save(file)
    print(f"{file}: {constants.describe()}")
    for name, value in vars(constants).items():
        if isinstance(value, int | float):
            print(f"  {name:24}{value:14.4g}")
    return constants


def _planned(args: argparse.Namespace, numbers: list[str], constants: Any) -> dict[str, Any]:
    from retro.retrieval.planning.plan import PlanSettings, corpus_of_numbers, make_plan, parse_bytes, parse_count
    from retro.retrieval.planning.shapes import embedder_shape

    shape = embedder_shape(args.embedder)
    vocab_size = parse_count(args.vocab_size, "--vocab-size") if args.vocab_size else 32_000
    if args.inputs:
        corpus, vocab_size = _sampled(args)
    else:
        parse = {"bytes": parse_bytes}
        given = {name: parse.get(name, parse_count)(getattr(args, name), f"--{name}") for name in numbers}
        corpus = corpus_of_numbers(**given, chunk_len=args.chunk_len)
    settings = PlanSettings(
        vocab_size,
        args.key_dtype,
        parse_count(args.shard_chunks, "--shard-chunks"),
        args.index,
        args.k,
        args.workers,
        args.gpus,
        args.gpu_tflops,
        args.mfu,
        args.memory and parse_bytes(args.memory, "--memory"),
    )
    result = make_plan(corpus, settings, shape, constants)
    if args.model:
        result["training"] = _training(args, corpus, vocab_size)
    return result


def _sampled(args: argparse.Namespace) -> tuple[Any, int]:
    """The corpus that the inputs hold, and the size of the tokenizer's vocabulary."""
    from retro.retrieval.building.tasks import load_tokenizer
    from retro.retrieval.embedding.embedder import NO_EMBEDDER, load_embedder
    from retro.retrieval.planning.sampling import sample_corpus

    tokenizer, reader, prefix = load_tokenizer(args.tokenizer), None, ""
    if args.embedder != NO_EMBEDDER:
        embedder = load_embedder(args.embedder)
        reader, prefix = embedder.tokenizer, embedder.chosen.passage_prefix
    corpus = sample_corpus(
        args.inputs, tokenizer, reader, prefix, args.chunk_len, text_field=args.text_field, seed=args.seed
    )
    return corpus, len(tokenizer)


def _training(args: argparse.Namespace, corpus: Any, vocab_size: int) -> dict[str, Any]:
    from retro.model import RetroConfig
    from retro.model.config import MODERN, PRESETS
    from retro.retrieval.building.tasks import token_dtype
    from retro.retrieval.planning.plan import parse_bytes, parse_count
    from retro.training.scaling import Cluster, training_plan

    if args.model.removesuffix(MODERN) in PRESETS:
        config = RetroConfig.from_preset(args.model, vocab_size=vocab_size, num_neighbors=args.k or 2)
    elif (Path(args.model) / "config.json").is_file():
        config = RetroConfig.from_pretrained(args.model)
    else:
        raise ValueError(
            f"--model is {args.model!r}; give one of {', '.join(PRESETS)}, alone or with {MODERN} behind it, or a "
            "folder with config.json"
        )
    memory = parse_bytes(args.gpu_memory, "--gpu-memory")
    cluster = Cluster(args.gpus, args.gpu_tflops, memory, args.mfu, args.gpus_per_node)
    tokens = parse_count(args.train_tokens, "--train-tokens") if args.train_tokens else corpus.tokens
    width = token_dtype(vocab_size).itemsize
    return training_plan(config, cluster, tokens, args.batch_size, width, not args.no_checkpointing)


def lines_of(result: dict[str, Any]) -> list[str]:
    """A plan to read."""
    corpus, index, shown = result["corpus"], result["index"], []
    about = f"{corpus['documents']:,} documents, {corpus['bytes']:,} bytes, {corpus['tokens']:,} tokens"
    shown.append(f"{about}, {corpus['chunks']:,} chunks of {corpus['chunk_len']} in {result['shards']:,} shards")
    if result["assumed"]:
        shown.append(f"assumed: {', '.join(result['assumed'])}")
    shown += ["disk", *_rows(result["disk"], _bytes), "memory", *_rows(result["memory"], _bytes)]
    shown += ["operations", *_rows(result["flops"], lambda count: f"{count:.3g} FLOP")]
    if index["layout"]:
        layout = index["layout"]
        tree = f", {layout['lists']:,} lists" if layout["lists"] else ""
        shown.append(f"index {index['kind']}: {index['segments']:,} segments of {index['rows_per_segment']:,} rows, ")
        shown[-1] += f"codes {layout['codes']}{tree}"
    if result["hours"]:
        known = result["calibration"]
        shown.append(f"time, by constants of {known}" if known else "time of the GPUs; other stages are not calibrated")
        shown += _rows(result["hours"], _duration)
    else:
        shown.append("no times: this machine is not calibrated; measure it with retro plan --calibrate")
    return shown + (_training_lines(result["training"]) if "training" in result else [])


def _training_lines(training: dict[str, Any]) -> list[str]:
    shown = ["training", *_rows({"parameters": training["parameters"]}, "{:,}".format)]
    counts = {"operations a token, forward": training["forward_flops_per_token"], "all": training["training_flops"]}
    shown += _rows(counts, lambda count: f"{count:.3g} FLOP")
    shown += _rows({"tokens a second": training["tokens_per_second"]}, "{:,.0f}".format)
    shown += _rows({"time": training["hours"]}, _duration)
    shown += [f"memory of a GPU: it {'fits' if training['fits'] else 'does not fit'}"]
    shown += _rows(training["gpu_bytes"], _bytes)
    shown += ["the datastore while training"]
    shown += _rows({"random reads a second of a node": training["node_reads_per_second"]}, "{:,.0f}".format)
    return shown + _rows({"bytes a second of a node": training["node_bytes_per_second"]}, _bytes)


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
