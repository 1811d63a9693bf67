"""Tiny random bases of many architectures, their weights spread out so that a wrong place or mask shows."""

import pytest
import torch

SIZES = dict(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
GPT2 = dict(vocab_size=64, n_embd=16, n_layer=3, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=2)
EXPERTS = dict(SIZES, num_local_experts=2, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16)
SHORT_WINDOW = dict(SIZES, sliding_window=8)
# name -> model type, fields, and what the layers are: "between" (pre-norm or norm after each part) or "beside"
ARCHITECTURES = {
    "llama": ("llama", SIZES, "between"),
    "mistral": ("mistral", SHORT_WINDOW, "between"),
    "mixtral": ("mixtral", EXPERTS, "between"),
    "qwen2": ("qwen2", SIZES, "between"),
    "qwen3": ("qwen3", dict(SIZES, head_dim=8), "between"),
    "qwen3_moe": ("qwen3_moe", dict(EXPERTS, head_dim=8), "between"),
    "gemma": ("gemma", dict(SIZES, head_dim=8), "between"),
    "gemma2": ("gemma2", dict(SHORT_WINDOW, head_dim=8), "between"),
    "gemma3": ("gemma3_text", dict(SHORT_WINDOW, head_dim=8), "between"),
    "gpt2": ("gpt2", GPT2, "between"),
    "gpt_bigcode": ("gpt_bigcode", GPT2, "between"),
    "gpt_neo": (
        "gpt_neo",
        dict(
            vocab_size=64,
            hidden_size=16,
            num_layers=4,
            num_heads=2,
            attention_types=[[["global", "local"], 2]],
            max_position_embeddings=64,
            window_size=8,
            bos_token_id=1,
            eos_token_id=2,
        ),
        "between",
    ),
    "gpt_neox": ("gpt_neox", dict(SIZES, num_key_value_heads=2), "beside"),
    "gpt_neox_sequential": ("gpt_neox", dict(SIZES, num_key_value_heads=2, use_parallel_residual=False), "between"),
    "gptj": ("gptj", dict(GPT2, rotary_dim=4), "beside"),
    "codegen": ("codegen", dict(GPT2, n_head=4, rotary_dim=2), "beside"),
    "opt": ("opt", dict(SIZES, num_key_value_heads=2, ffn_dim=24, word_embed_proj_dim=16), "between"),
    "opt_post_norm": (
        "opt",
        dict(SIZES, ffn_dim=24, word_embed_proj_dim=8, do_layer_norm_before=False),
        "between",
    ),
    "bloom": (
        "bloom",
        dict(vocab_size=64, hidden_size=16, n_layer=3, n_head=2, bos_token_id=1, eos_token_id=2, pad_token_id=0),
        "between",
    ),
    "falcon": ("falcon", SIZES, "beside"),
    "falcon_new": ("falcon", dict(SIZES, new_decoder_architecture=True), "beside"),
    "phi": ("phi", SIZES, "beside"),
    "phi3": ("phi3", SIZES, "between"),
    "olmo": ("olmo", SIZES, "between"),
    "olmo2": ("olmo2", SIZES, "between"),
    "olmo3": ("olmo3", SHORT_WINDOW, "between"),
    "stablelm": ("stablelm", SIZES, "between"),
    "stablelm_parallel": ("stablelm", dict(SIZES, use_parallel_residual=True), "beside"),
    "starcoder2": ("starcoder2", SIZES, "between"),
    "cohere": ("cohere", SIZES, "beside"),
    "cohere2": ("cohere2", dict(SHORT_WINDOW, head_dim=8), "beside"),
    "granite": ("granite", dict(SIZES, residual_multiplier=0.22, logits_scaling=2.0), "between"),
    "smollm3": ("smollm3", SIZES, "between"),
    "mpt": ("mpt", dict(vocab_size=64, d_model=16, n_layers=3, n_heads=2, max_seq_len=64), "between"),
    "glm4": ("glm4", dict(SIZES, head_dim=8), "between"),
    "gpt_oss": ("gpt_oss", dict(EXPERTS, head_dim=8, sliding_window=8), "between"),
    "lfm2": ("lfm2", dict(SIZES, layer_types=["conv", "full_attention", "full_attention"]), "between"),
    "nemotron": ("nemotron", SIZES, "between"),
}
# name -> the options that make it: each form, and both starts of the paper's
FORMS = {
    "pointer": {"form": "pointer"},
    "paper": {"form": "paper", "encoder_num_layers": 1},
    "random": {"form": "paper", "start": "random", "encoder_num_layers": 1},
    "joint": {"form": "joint", "encoder_num_layers": 1},
}
forms = pytest.mark.parametrize("form", FORMS)
most_forms = pytest.mark.parametrize("form", ["random", "joint"])  # which holds both other parts


@pytest.fixture
def make_base():
    """make_base(name, **changes): a tiny random causal LM in evaluation mode."""
    from transformers import AutoConfig, AutoModelForCausalLM

    def make(name: str = "llama", seed: int = 0, **changes):
        model_type, fields, _ = ARCHITECTURES.get(name, (name, SIZES, None))
        torch.manual_seed(seed)
        base = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**fields, **changes})).eval()
        with torch.no_grad():
            for parameter in base.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return base

    return make


@pytest.fixture
def make_fitted(make_base):
    """make_fitted(name, base, form, **options): a base fitted for chunks of 4, values of 8; CCA in layers 2 and 3."""
    from retro.retrofit import retrofit

    def make(name: str = "llama", base=None, form: str = "paper", **options):
        torch.manual_seed(1)
        fit = FORMS.get(form, {"form": form}) | dict(chunk_len=4, retrieved_len=8)
        fit |= dict(cca_layers=[2, 3]) if form in ("paper", "random", "joint") else {}
        return retrofit(make_base(name) if base is None else base, **{**fit, **options})

    return make


@pytest.fixture
def make_neighbors():
    """make_neighbors(b, l): neighbor_ids and neighbor_mask [b, l, 2, 8]; some neighbors short, one missing."""

    def make(b: int, num_chunks: int, seed: int = 0) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        shape = (b, num_chunks, 2, 8)
        lens = torch.randint(3, 9, shape[:3], generator=generator)
        lens[0, 0, 1] = 0
        return {
            "neighbor_ids": torch.randint(0, 64, shape, generator=generator),
            "neighbor_mask": torch.arange(8) < lens[..., None],
        }

    return make


@pytest.fixture
def open_gates():
    """open_gates(model): let what is added show."""

    def open_them(model, to: float = 1.0):
        with torch.no_grad():
            for name, parameter in model.form.named_parameters():
                if name.endswith(("gate", "opening")):
                    parameter.fill_(to)
                elif name.endswith(("gate.bias", "sink")):
                    parameter.fill_(0.0)
                elif name.endswith("prior"):
                    parameter.fill_(0.5)
                elif parameter.ndim > 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))

    return open_them


@pytest.fixture(autouse=True)
def one_thread():
    """So small a model gains nothing from more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
