"""What the parts of the small recipe are worth: its start, smeared keys, the positions of CCA, dropped neighbors.

Trains each variant on the same tokens of a demo's datastore (`retro demo` first) and measures it on what is held out.

    python benchmarks/ablation.py --demo demo --tokens 300000 --json ablation.json
"""

import argparse
import json
import shutil
from pathlib import Path

from retro.common.settings import find_config, load_settings
from retro.evaluation import ScoringSettings, bits_per_byte, prepare, score
from retro.loading import load
from retro.model import RetroForCausalLM
from retro.text.corpus import read_documents
from retro.training.loop import fit
from retro.training.pretrain import model_config
from retro.training.settings import TrainSettings
from retro.training.setup import setup

ONE_RATE = "lr_ratios={}"  # a random start has nothing to protect
VARIANTS = {
    "plain LM": ["retrieval=false"],
    "the recipe": [],
    "plain LM, random start": ["retrieval=false", "model.cca_init=random"],
    "the recipe, no neighbors dropped": ["drop_neighbors=0"],
    "the recipe, embeddings not multiplied": ["model.embedding_multiplier=1"],
    "the recipe, positions in CCA": ["model.cca_partial_rotary_factor=1.0"],
    "identity start, plain keys": ["lr_ratios={cross_attention.attention: 0.3}"],
    "smeared keys, random start": ["model.cca_init=random", ONE_RATE],
    "as in the paper, random start": [
        "model.smeared_keys=false",
        "model.cca_init=random",
        "model.cca_partial_rotary_factor=1.0",
        ONE_RATE,
    ],
}


class PlainKeys(RetroForCausalLM):
    """The induction-ready start without its smeared keys: they are closed, and stay closed."""

    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            if layer.cross_attention is not None:
                layer.cross_attention.smear.requires_grad_(False).zero_()


def run(variant: str, overrides: list[str], arguments: argparse.Namespace, folder: Path) -> dict:
    """Train one variant and measure it."""
    given = [f"store={arguments.demo / 'store'}", f"output={folder}", f"max_tokens={arguments.tokens}"]
    settings = load_settings(
        TrainSettings, find_config("train_small", "train"), [*given, f"seed={arguments.seed}", *overrides]
    )
    fit(setup(settings, model_config, PlainKeys if "plain keys" in variant else RetroForCausalLM))
    model, _, retriever = load(folder, arguments.demo / "store")
    documents = list(read_documents([str(arguments.demo / "valid.jsonl")]))[: arguments.documents]
    if not settings.retrieval:
        data = prepare(documents, retriever.store.tokenizer, retriever.store.chunk_len)
        return {"bpb": {"lm": score(model, data).bits_per_byte(data)}}
    return bits_per_byte(model, documents, retriever, scoring=ScoringSettings(progress=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("demo"), help="folder that `retro demo` wrote")
    parser.add_argument("--tokens", type=int, default=300_000)
    parser.add_argument("--documents", type=int, help="measure on so many held-out documents; default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("runs/ablation"), help="where models are written")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results = {}
    for number, (variant, overrides) in enumerate(VARIANTS.items()):
        folder = arguments.work / str(number)
        shutil.rmtree(folder, ignore_errors=True)
        results[variant] = run(variant, overrides, arguments, folder)
    print(f"{'':44}{'OFF / LM':>10}{'ON':>10}{'random':>10}")
    for variant, result in results.items():
        bpb = result["bpb"]
        cells = [bpb.get("retro_off", bpb.get("lm")), bpb.get("retro_on"), bpb.get("retro_on_random")]
        print(f"{variant:44}" + "".join(f"{cell:10.4f}" if cell else f"{'':10}" for cell in cells))
    if arguments.json:
        arguments.json.write_text(json.dumps({"tokens": arguments.tokens, "variants": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
