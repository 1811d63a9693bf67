"""Saving, loading, and the weights that a RETRO starts with: random, or an induction head."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import logging

from retro.common.pretrained import check_folder, check_weights
from retro.common.records import forget_sums
from retro.model.config import RetroConfig
from retro.modules import Attention, ChunkedCrossAttention
from retro.modules.feed_forward import ResidualLinear
from retro.modules.norm import RMSNorm
from retro.modules.positions import RelativePositions

logger = logging.get_logger(__name__)

# The induction-ready start, see RetroPreTrainedModel
SMEAR = 0.7  # share of the token before in a key
MATCH_MARGIN = 4.5  # nats by which the right key outweighs all others
NOISE = 0.15  # of W_q and W_k, relative to their scale
COPY_LOGIT = 8.0


class RetroPreTrainedModel(PreTrainedModel):
    """Saving, loading and the one place where weights get their start.

    Random start: normal with standard deviation `initializer_range` (0.02); the matrices that write into the residual
    stream (W_o, W_down) are divided by sqrt(2 x layers) as in GPT-2; norms are 1, the relative biases u and v 0.

    Induction-ready start (`cca_init="induction"`, ours; the circuit is that of Olsson et al. 2022): a query of CCA
    finds the place in a neighbor that follows the token it has just read, and writes what stands there. It reads the
    same at every width, since nothing stands between the embeddings and CCA at the start and nothing drowns them later:

        W_o, W_down = 0             of everything but CCA, so that both streams are the embeddings themselves
        W_q = W_k = a I + noise     of CCA, sd of the noise 0.15 a / sqrt(d), a^2 = beta / (0.7 sqrt(head_dim)); the
                                    right key scores beta = ln(k r) + 4.5, so that it weighs e^4.5 times as much as k r
                                    keys of score 0 together
        smear = 0.7, W_v = I        keys see the token before theirs; values are the tokens
        W_o = sigma mu I            of CCA: what is written is as large as an embedding; mu is `embedding_multiplier`,
                                    sqrt(d), which keeps Adam's first steps small beside the embeddings
        final norm = 8 / (sigma d)  the logit of a token that the stream holds is about 8
    """

    config_class = RetroConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["DecoderBlock", "EncoderBlock"]

    def __init__(self, config: RetroConfig, *args, **kwargs):
        self.get_correct_attn_implementation(config._attn_implementation)  # before code for another is looked for
        super().__init__(config, *args, **kwargs)

    def save_pretrained(self, save_directory: str | Path, *args, **kwargs) -> None:
        """As transformers' own; checksums of what the folder held before are taken away."""
        forget_sums(save_directory)
        super().save_pretrained(save_directory, *args, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path | None, *args, **kwargs) -> Any:
        """As Hugging Face's, of safetensors alone.

        Raises ValueError for a folder of pickled weights, for one of another model, and for one whose config.json asks
        for more weights than it holds.
        """
        if kwargs.pop("use_safetensors", None) is False:
            raise ValueError("use_safetensors is False, but pickled weights, which could run code, are not read.")
        folder = Path(pretrained_model_name_or_path or "", kwargs.get("subfolder") or "")
        if pretrained_model_name_or_path is not None and folder.is_dir():
            check_folder(folder)
            config = kwargs.get("config")
            if config is None and (folder / "config.json").is_file():
                kind = cls.config_class.get_config_dict(folder)[0].get("model_type")
                if kind != cls.config_class.model_type:
                    raise ValueError(f"{folder} holds a {kind}, no RETRO; open it with AutoModelForCausalLM.")
            check_weights(folder, lambda: cls(cls.config_class.from_pretrained(folder) if config is None else config))
        return super().from_pretrained(pretrained_model_name_or_path, *args, use_safetensors=True, **kwargs)

    def set_attn_implementation(self, attn_implementation: str, allow_all_kernels: bool = False) -> None:
        """ValueError for another than "sdpa"."""
        self.get_correct_attn_implementation(attn_implementation)

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        if requested_attention not in (None, "sdpa"):
            raise ValueError(f"attn_implementation is {requested_attention!r}; RETRO attends by 'sdpa' only.")
        return "sdpa"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std, layers = self.config.initializer_range, self.config.num_hidden_layers
        induction = self.config.cca_init == "induction"
        if isinstance(module, ResidualLinear):
            if induction:
                init.zeros_(module.weight)
            else:
                init.normal_(module.weight, std=std / (2 * layers) ** 0.5)
        elif isinstance(module, nn.Linear | nn.Embedding):
            init.normal_(module.weight, std=std)
        elif isinstance(module, FinalNorm) and induction:
            init.constant_(module.weight, COPY_LOGIT / (std * self.config.hidden_size))
        elif isinstance(module, nn.RMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, RelativePositions):
            init.zeros_(module.content_bias)
            init.zeros_(module.position_bias)
        elif isinstance(module, ChunkedCrossAttention):
            if module.smear is not None:
                init.constant_(module.smear, SMEAR)
            if induction:
                _start_as_induction_head(module.attention, self.config)

    def _resize_token_embeddings(self, new_num_tokens=None, pad_to_multiple_of=None, mean_resizing=True) -> nn.Module:
        """As Hugging Face's, for the encoder's own embeddings too."""
        embeddings = super()._resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        own = getattr(self.base_model, "encoder_embedding", None)
        if isinstance(own, nn.Embedding):
            self._get_resized_embeddings(own, len(embeddings.weight), mean_resizing=mean_resizing)
        return embeddings


def _start_as_induction_head(attention: Attention, config: RetroConfig) -> None:
    """W_q = W_k = a I + noise, W_v = I, W_o = sigma mu I; see RetroPreTrainedModel."""
    d = config.hidden_size
    if config.head_dim < 32:
        logger.warning_once(
            f"cca_init is 'induction' and head_dim is {config.head_dim}; with heads below 32 channels it tells fewer "
            "tokens apart."
        )
    beta = math.log(config.num_neighbors * config.retrieved_len) + MATCH_MARGIN
    a = (beta / (SMEAR * config.head_dim**0.5)) ** 0.5
    written = config.initializer_range * config.embedding_multiplier
    for projection, scale, noise in (("q", a, NOISE * a), ("k", a, NOISE * a), ("v", 1.0, 0.0), ("o", written, 0.0)):
        weight = getattr(attention, f"{projection}_proj").weight
        identity = torch.eye(d, dtype=weight.dtype, device=weight.device)
        init.copy_(weight, scale * identity + noise / d**0.5 * torch.randn_like(weight))


class FinalNorm(RMSNorm):
    """The norm before the output embeddings. A class of its own, so that it can be given a start of its own."""
