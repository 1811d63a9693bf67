"""Tiny random encoders in folders laid out as on the hub, one per architecture that a preset or a user may name."""

import json

import torch

KINDS = ("bert", "roberta", "xlm-roberta", "mpnet", "modernbert", "t5", "llama", "mistral")
WORDS = [f"w{i}" for i in range(40)] + ["query", "passage", ":", "Represent", "this", "<|embed|>", "instruct", "W1"]
_SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=64)


def make_encoder(folder, kind="bert", seed=0, dtype=torch.float32, **changes):
    """Write config.json, model.safetensors and a tokenizer of words; the folder's path as a string."""
    import transformers

    torch.manual_seed(seed)
    config_class, model_class = {
        "bert": ("BertConfig", "BertModel"),
        "roberta": ("RobertaConfig", "RobertaModel"),
        "xlm-roberta": ("XLMRobertaConfig", "XLMRobertaModel"),
        "mpnet": ("MPNetConfig", "MPNetModel"),
        "modernbert": ("ModernBertConfig", "ModernBertModel"),
        "t5": ("T5Config", "T5EncoderModel"),
        "llama": ("LlamaConfig", "LlamaModel"),
        "mistral": ("MistralConfig", "MistralModel"),
    }[kind]
    config = getattr(transformers, config_class)(**_sizes(kind), **changes)
    model = getattr(transformers, model_class)(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter) * (0.2 if "norm" in name.lower() or "bias" in name else 0.3))
    model.to(dtype).save_pretrained(folder)
    make_tokenizer(kind).save_pretrained(folder)
    return str(folder)


def _sizes(kind):
    special = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    if kind == "t5":
        return dict(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=64, **special)
    if kind in ("llama", "mistral"):
        return {**_SIZES, **special, "num_key_value_heads": 2, "max_position_embeddings": 96}
    if kind == "modernbert":
        return {**_SIZES, **special, "cls_token_id": 1, "sep_token_id": 2, "max_position_embeddings": 96}
    if kind == "bert":
        return {**_SIZES, "pad_token_id": 0, "max_position_embeddings": 96}
    return {**_SIZES, **special, "max_position_embeddings": 96}  # positions from pad + 1 on


def make_tokenizer(kind):
    """Words to ids; a bos and an eos around a text, as encoders have them, or a bos alone before a decoder's."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    frame = {"t5": "$A </s>", "llama": "<s> $A", "mistral": "<s> $A"}.get(kind, "<s> $A </s>")
    backend.post_processor = processors.TemplateProcessing(single=frame, special_tokens=[("<s>", 1), ("</s>", 2)])
    special = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    special |= {} if kind == "mistral" else dict(pad_token="<pad>")
    special |= {} if kind in ("llama", "mistral") else dict(cls_token="<s>", sep_token="</s>")
    limit = {"t5": 96, "llama": 96, "mistral": 96}.get(kind, 90)
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=limit, **special)


def add_modules(folder, pooling="mean_tokens", dense=None, normalize=False, max_length=64, seed=0, **config):
    """The side files of sentence-transformers as hub repositories of 2021 to 2024 have them.

    dense: {"out_features", "bias", "activation_function"}; config: of config_sentence_transformers.json.
    """
    kinds = ["Transformer", "Pooling"] + ["Dense"] * (dense is not None) + ["Normalize"] * normalize
    modules = [
        {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "", "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    write_json(folder, "modules.json", modules)
    write_json(folder, "sentence_bert_config.json", {"max_seq_length": max_length, "do_lower_case": False})
    modes = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
    flags = {f"pooling_mode_{mode}": mode == pooling for mode in modes}
    prompt = {"include_prompt": config.pop("include_prompt")} if "include_prompt" in config else {}
    write_json(folder, "1_Pooling/config.json", {"word_embedding_dimension": 32, **flags, **prompt})
    write_json(folder, "config_sentence_transformers.json", {"__version__": {}, **config})
    if dense is not None:
        add_dense(folder, dense, seed)
    return str(folder)


def add_dense(folder, dense, seed=0):
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    write_json(folder, "2_Dense/config.json", {"in_features": 32, **dense})
    weights = {"linear.weight": torch.randn(dense["out_features"], 32, generator=generator) / 6}
    if dense["bias"]:
        weights["linear.bias"] = torch.randn(dense["out_features"], generator=generator)
    save_file(weights, f"{folder}/2_Dense/model.safetensors")


def write_json(folder, name, value):
    from pathlib import Path

    path = Path(folder) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def hub_folder(cache, name):
    """The snapshot of a repository in a Hugging Face cache, empty."""
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / "main").write_text("0" * 40)
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True, exist_ok=True)
    return snapshot
