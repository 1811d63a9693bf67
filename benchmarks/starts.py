"""How a RETRO starts: what its chunked cross-attention reads before training and after its first steps, by width.

Random tokens with half of each chunk in a neighbor of the chunk before (retro.evaluation.copying). For each width and
start the attention on the token to copy in every layer of P, and how far neighbors raise that token's logit; then the
same after a few steps of the recipe on text that is new at each, at the full learning rate.

    python benchmarks/starts.py --widths 128 256 512 --steps 20 --json starts.json
"""

import argparse
import json
from pathlib import Path

import torch

from retro.common.settings import find_config, read_yaml
from retro.evaluation.copying import attention_on_copies, copying_text, logit_gain
from retro.model import RetroConfig, RetroForCausalLM
from retro.training.optimizer import parameter_groups

RECIPE = read_yaml(find_config("train_small", "train"))
STARTS = {
    "induction": {},
    "induction, multiplier 1": {"embedding_multiplier": 1},
    "random, keys smeared": {"cca_init": "random"},
}


def make(width: int, start: str, layers: int, cca_layers: list[int], vocab_size: int, seed: int) -> RetroForCausalLM:
    """The model of the recipe at a width, with heads of 32, or of 64 from 256 on."""
    heads = width // (64 if width >= 256 else 32)
    size = dict(hidden_size=width, num_attention_heads=heads, num_hidden_layers=layers, cca_layers=cca_layers)
    torch.manual_seed(seed)
    return RetroForCausalLM(RetroConfig(vocab_size=vocab_size, **{**RECIPE["model"], **size, **STARTS[start]}))


def train(model: RetroForCausalLM, steps: int) -> None:
    """Steps of the recipe on copying text."""
    ratio = RECIPE["lr_width"] / model.config.hidden_size
    groups = parameter_groups(model, RECIPE["weight_decay"], RECIPE["lr_ratios"], width_ratio=ratio)
    groups = [{**group, "lr": RECIPE["lr"] * group["lr_ratio"]} for group in groups]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    model.train()
    for step in range(steps):
        ids, neighbors, _ = copying_text(model.config, seed=1 + step)
        model(ids, neighbors, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def measure(model: RetroForCausalLM) -> dict:
    """Attention by layer of P, and the logit's rise."""
    text = copying_text(model.config)
    return {"attention": attention_on_copies(model.eval(), text), "logit_gain": logit_gain(model, text)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 256, 512])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--cca-layers", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    sizes = (arguments.layers, arguments.cca_layers, arguments.vocab_size, arguments.seed)
    print(f"{'width':>6}  {'start':26}{'steps':>6}  {'attention on the token to copy':34}{'logit, nats':>12}")
    rows = []
    for width in arguments.widths:
        for start in STARTS:
            model = make(width, start, *sizes)
            for steps in (0, arguments.steps):
                train(model, steps)
                found = {"width": width, "start": start, "steps": steps, **measure(model)}
                layers = ", ".join(f"{one:.3f}" for one in found["attention"])
                print(f"{width:6}  {start:26}{steps:6}  {layers:34}{found['logit_gain']:12.2f}", flush=True)
                rows.append(found)
    if arguments.json:
        arguments.json.write_text(json.dumps({"arguments": vars(arguments) | {"json": None}, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
