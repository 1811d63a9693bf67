"""The command `retro`: one verb, one function. Nothing heavy is imported before a verb runs."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; what the user can mend is one line on stderr and exit code 2."""
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        return args.run(args) or 0
    except (ValueError, OSError) as error:
        print(f"retro: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("retro: stopped", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="retro", description="Language models that read from a datastore.")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    data, models = (add_build, add_tokenizer, add_neighbors, add_search), (add_train, add_retrofit)
    for add in (*data, *models, add_evaluate, add_generate, add_demo):
        add(verbs)
    return parser


def _verb(verbs: Any, name: str, run: Callable[[argparse.Namespace], int | None], help: str) -> argparse.ArgumentParser:
    """Add a verb; its function's docstring is its description."""
    parser = verbs.add_parser(name, help=help, description=(run.__doc__ or "").strip())
    parser.set_defaults(run=run)
    return parser


# build


def add_build(verbs: Any) -> None:
    parser = _verb(verbs, "build", build, "documents to a datastore: chunks, keys and an index")
    parser.add_argument("store", metavar="STORE", help="folder to write")
    parser.add_argument(
        "inputs",
        metavar="INPUT",
        nargs="+",
        help=".jsonl(.gz), .parquet, .txt/.md/.rst, a folder of those, a datasets name or folder, or package:NAME",
    )
    parser.add_argument(
        "--tokenizer",
        required=True,
        metavar="T",
        help="Hugging Face name or folder, a GGUF file, or package:NAME for the GGUF file of an installed package",
    )
    parser.add_argument(
        "--embedder", default="minilm", metavar="E", help="Hugging Face name or folder; default: minilm"
    )
    parser.add_argument(
        "--pooling", choices=["mean", "cls"], help="default: what the embedder's folder says, else mean"
    )
    parser.add_argument("--query-prefix", default="", help="text that the embedder wants before a query")
    parser.add_argument("--passage-prefix", default="", help="text that the embedder wants before a passage")
    parser.add_argument("--max-length", type=int, metavar="N", help="of the embedder; default: what its folder says")
    parser.add_argument("--key-dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--chunk-len", type=int, default=64, metavar="M", help="tokens of a chunk")
    parser.add_argument("--min-chunk-len", type=int, default=8, metavar="N", help="shorter chunks are never retrieved")
    parser.add_argument("--text-field", default="text", metavar="NAME", help="field or column that holds the text")
    parser.add_argument(
        "--on-bad", default="error", choices=["error", "reject"], help="at a record that is no document"
    )
    parser.add_argument(
        "--decontaminate",
        nargs="+",
        default=[],
        metavar="INPUT",
        help="held-out documents, whose near-copies are left out",
    )
    parser.add_argument("--index", default="auto", choices=["auto", "none", "exact", "scann", "faiss"])
    parser.add_argument("--shard-chunks", type=int, default=1_000_000, metavar="N", help="chunks of a shard")
    parser.add_argument(
        "--batch-size", type=int, metavar="N", help="chunks per forward pass; default: suits the device"
    )
    _add_json(parser)


def build(args: argparse.Namespace) -> int:
    """Build a datastore. What is there already is opened; a build that was killed is taken up again."""
    from dataclasses import fields

    from retro.retrieval import BuildSettings, build_store

    settings = BuildSettings(
        **{field.name: getattr(args, field.name) for field in fields(BuildSettings) if field.name in args}
    )
    store = build_store(settings, progress=True)
    counts = store.manifest["counts"]
    print(f"{store.path}: {store.num_documents} documents, {store.num_chunks} chunks, {counts['tokens']} tokens")
    print("read {read} = kept {kept} + empty {empty} + filtered {filtered} + rejected {rejected}".format(**counts))
    print("{short_chunks} chunks too short to retrieve, {truncated_chunks} cut by the embedder".format(**counts))
    _write_json(args.json, {"store": str(store.path), "counts": counts} | _stamp(store))
    return 0


# tokenizer


def add_tokenizer(verbs: Any) -> None:
    parser = _verb(verbs, "tokenizer", tokenizer, "train a SentencePiece tokenizer on documents")
    parser.add_argument("out", metavar="OUT", help="folder to write; Hugging Face loads it as a fast tokenizer")
    parser.add_argument("inputs", metavar="INPUT", nargs="+", help="as for retro build")
    parser.add_argument("--vocab-size", type=int, default=32_000, metavar="N")
    parser.add_argument("--text-field", default="text", metavar="NAME", help="field or column that holds the text")


def tokenizer(args: argparse.Namespace) -> int:
    """Train a byte-pair tokenizer with byte fallback that gives back every text as it was."""
    from retro.tokenizer import train_tokenizer

    trained = train_tokenizer(args.out, args.inputs, args.vocab_size, args.text_field)
    print(f"{args.out}: {len(trained)} pieces")
    return 0


# neighbors


def add_neighbors(verbs: Any) -> None:
    parser = _verb(verbs, "neighbors", neighbors, "write the neighbors of every chunk, ahead of training")
    parser.add_argument("store", metavar="STORE", help="datastore to search")
    parser.add_argument("--k", type=int, default=2, metavar="N", help="neighbors per chunk")
    parser.add_argument("--queries", metavar="STORE2", help="whose chunks to search for; default: STORE's own")
    parser.add_argument("--index", default="exact", choices=["exact", "auto", "scann", "faiss"])
    parser.add_argument(
        "--exclude", default="same_document", choices=["same_document", "none"], help="what is no neighbor of a chunk"
    )
    _add_json(parser)


def neighbors(args: argparse.Namespace) -> int:
    """Write the k nearest chunks of every chunk, those of its own document left out."""
    from retro.retrieval import Store, build_neighbors

    store = Store.open(args.store)
    queries = Store.open(args.queries) if args.queries else None
    table = build_neighbors(store, args.k, queries, args.exclude, args.index, progress=True)
    missing = table.record["missing"]
    print(f"{table.path}: {args.k} neighbors of {len(table.rows)} chunks, {missing} missing")
    _write_json(args.json, {"table": str(table.path), **table.record} | _stamp(store))
    return 0


# search


def add_search(verbs: Any) -> None:
    parser = _verb(verbs, "search", search, "show what the datastore holds nearest to a text")
    parser.add_argument("store", metavar="STORE", help="datastore to search")
    parser.add_argument("text", metavar="TEXT")
    parser.add_argument("--k", type=int, default=5, metavar="N", help="neighbors to show")
    parser.add_argument("--index", default="auto", choices=["auto", "exact", "scann", "faiss"])
    parser.add_argument(
        "--retrieved-len", type=int, default=128, metavar="R", help="tokens of a neighbor and what follows it"
    )
    _add_json(parser)


def search(args: argparse.Namespace) -> int:
    """Print the nearest chunks with their continuations, scores (-squared L2 distance) and sources."""
    from retro.retrieval import Retriever

    if not args.text.strip():
        raise ValueError("the text to search for is empty; give some words")
    retriever = Retriever(args.store, args.index, num_neighbors=args.k, retrieved_len=args.retrieved_len)
    hits = retriever.show(args.text)
    for rank, hit in enumerate(hits, start=1):
        title = hit["title"] or hit["document_id"]
        print(f"[{rank}] score {hit['score']:.4f}  {title}  chunk {hit['position']}  {hit['source']}")
        print(f"{hit['neighbor'].strip()}\n  ...\n{hit['continuation'].strip()}\n")
    result = {"text": args.text, "index": retriever.index.kind, "neighbors": hits}
    _write_json(args.json, result | _stamp(retriever.store))
    return 0


# train


def add_train(verbs: Any) -> None:
    parser = _verb(verbs, "train", train, "train a RETRO, or a plain LM, from scratch")
    _add_recipe(parser, "train_small ...", "store=stores/docs output=runs/a lr=1e-3")


def train(args: argparse.Namespace) -> int:
    """Train as CONFIG and key=value say. The same command goes on from the last checkpoint in `output`."""
    return _run_recipe("retro.train.pretrain", args)


# retrofit


def add_retrofit(verbs: Any) -> None:
    parser = _verb(verbs, "retrofit", retrofit, "teach a pretrained LM to read neighbors; its own weights stay")
    _add_recipe(parser, "retrofit_smollm2", "base=gpt2 store=stores/docs output=runs/fitted")


def retrofit(args: argparse.Namespace) -> int:
    """RETRO-fit as CONFIG and key=value say. The same command goes on from the last checkpoint in `output`."""
    return _run_recipe("retro.train.retrofit", args)


# evaluate


def add_evaluate(verbs: Any) -> None:
    parser = _verb(verbs, "evaluate", evaluate, "bits per byte of held-out documents, retrieval ON and OFF")
    parser.add_argument("model", metavar="MODEL", help="folder of a trained model")
    parser.add_argument("--store", required=True, help="datastore to read from")
    parser.add_argument("--data", required=True, nargs="+", metavar="INPUT", help="held-out documents")
    parser.add_argument("--lm", metavar="MODEL", help="a plain LM to score beside it, with the same tokenizer")
    parser.add_argument("--k", type=int, metavar="N", help="neighbors per chunk; default: the model's")
    parser.add_argument(
        "--window", type=int, metavar="N", help="tokens in a window; default: the model's, at most 2048"
    )
    parser.add_argument("--index", default="auto", help="auto, exact, scann or faiss")
    parser.add_argument("--seed", type=int, default=0, help="of the random neighbors")
    _add_json(parser)


def evaluate(args: argparse.Namespace) -> int:
    """Bits per byte of whole documents by windows of n tokens and stride n / 2: OFF, ON, ON with random neighbors."""
    from retro.corpus import read_documents
    from retro.evaluation import bits_per_byte, bits_table

    model, retriever = _open_model(args.model, args.store, args.index)
    baseline = _open_model(args.lm, retriever.store)[0] if args.lm else None
    documents = list(_only_documents(read_documents(args.data)))
    result = bits_per_byte(model, documents, retriever, args.k, baseline, args.window, args.seed, progress=True)
    result |= {"model": str(args.model), "store": str(args.store), "data": args.data} | _stamp(retriever.store)
    print(bits_table(result))
    _write_json(args.json, result)
    return 0


# generate


def add_generate(verbs: Any) -> None:
    parser = _verb(verbs, "generate", generate, "sample with retrieval at every chunk and show the sources")
    parser.add_argument("model", metavar="MODEL", help="folder of a trained model")
    parser.add_argument("prompt", metavar="PROMPT")
    parser.add_argument("--store", help="datastore to read from; needed unless --no-retrieval")
    parser.add_argument("--no-retrieval", action="store_true", help="RETRO[OFF]")
    parser.add_argument("--k", type=int, metavar="N", help="neighbors per chunk; default: the model's")
    parser.add_argument("--index", default="auto", help="auto, exact, scann or faiss")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--do-sample", action="store_true", help="sample; default: the most likely token")
    parser.add_argument("--temperature", type=float, help="of sampling; default 1")
    parser.add_argument("--top-p", type=float, help="sample from the likeliest tokens of this mass; default 1")
    parser.add_argument("--top-k", type=int, help="sample from the k likeliest tokens; default 50")
    parser.add_argument("--seed", type=int, default=0)
    _add_json(parser)


def generate(args: argparse.Namespace) -> int:
    """Continue a prompt, searching the store at the end of every chunk, and print the text and where it read."""
    import torch
    from transformers import AutoTokenizer

    from retro.attribution import sample_page, sample_text

    if not args.store and not args.no_retrieval:
        raise ValueError("--store is missing; name a datastore, or say --no-retrieval.")
    model, retriever = _open_model(args.model, None if args.no_retrieval else args.store, args.index)
    torch.manual_seed(args.seed)
    given = {"temperature": args.temperature, "top_p": args.top_p, "top_k": args.top_k}
    sampling = {name: value for name, value in given.items() if value is not None}
    if sampling and not args.do_sample:
        raise ValueError(f"--{next(iter(sampling)).replace('_', '-')} needs --do-sample.")
    sample = sample_text(
        model,
        AutoTokenizer.from_pretrained(args.model),
        args.prompt,
        retriever,
        args.k,
        max_new_tokens=args.max_new_tokens,
        do_sample=args.do_sample,
        **sampling,
    )
    print(sample_page(sample))
    _write_json(args.json, sample)
    return 0


# demo


def add_demo(verbs: Any) -> None:
    parser = _verb(verbs, "demo", demo, "text to a trained RETRO, measured and sampled from, without any download")
    parser.add_argument("--output", default="demo", metavar="DIR", help="where everything is written")
    parser.add_argument("--seed", type=int, default=0)


def demo(args: argparse.Namespace) -> int:
    """Build, train, measure and sample on the documentation of the Python packages installed here."""
    from retro.demo import run_demo

    print(run_demo(Path(args.output), args.seed))
    return 0


# what several verbs share


def _add_recipe(parser: argparse.ArgumentParser, packaged: str, example: str) -> None:
    parser.add_argument("config", metavar="CONFIG", help=f"a YAML file, or the name of a packaged one: {packaged}")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help=f"e.g. {example}")


def _run_recipe(module: str, args: argparse.Namespace) -> int:
    if not import_module(module).main(args.config, args.overrides):
        print("stopped; the same command goes on from the last checkpoint")
    return 0


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", metavar="FILE", help="write the result as JSON")


def _write_json(file: str | None, value: Any) -> None:
    if file:
        Path(file).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _stamp(store: Any) -> dict[str, str]:
    """What a result was measured with."""
    import torch
    import transformers

    import retro

    versions = {"retro": retro.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    return {"store_fingerprint": store.fingerprint, "versions": versions}


def _open_model(folder: str, store: Any = None, index: str = "auto") -> tuple[Any, Any]:
    """A trained model and, with a store, a retriever over it, refused if the store is another tokenizer's."""
    import torch
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    from retro.provenance import check_store
    from retro.retrieval import Retriever, Store

    if not (Path(folder) / "config.json").is_file():
        raise ValueError(f"{folder} holds no model (config.json is missing); give the folder of a trained model.")
    retriever = None
    if store is not None:
        store = store if isinstance(store, Store) else Store.open(store)
        check_store(folder, store)
    device = torch.accelerator.current_accelerator() or "cpu"
    try:
        model = AutoModelForCausalLM.from_pretrained(folder).to(device).eval()
    except (SafetensorError, StrictDataclassError) as error:
        raise ValueError(
            f"{folder} holds a damaged model ({error}); copy it again from where it was trained."
        ) from None
    if store is not None:
        retriever = Retriever(store, index, retrieved_len=getattr(model.config, "retrieved_len", 2 * store.chunk_len))
    return model, retriever


def _only_documents(records: Any) -> Any:
    """Documents with text; the first record that is no document is an error."""
    from retro.corpus import Document

    for record in records:
        if not isinstance(record, Document):
            raise ValueError(f"{record.file}, line {record.line}: {record.reason}")
        if record.text.strip():
            yield record


if __name__ == "__main__":
    sys.exit(main())
