"""RetroConfig: the sizes of a RETRO and the paper's presets."""

from collections.abc import Sequence
from typing import Annotated, Literal

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from retro.common.settings import unknown_name
from retro.common.values import NumNeighbors, Positive, Range, Size, check_value

# Tables 2 and 10: width, feed-forward width, heads, head size, layers, learning rate's preset aside. CCA every third
# layer from 6 (Table 2's parameter counts; Table 10's "from 9" contradicts them), an encoder of 2 x 896 everywhere.
_PRESETS = {
    "172m": dict(hidden_size=896, intermediate_size=3584, num_attention_heads=16, head_dim=64, num_hidden_layers=12),
    "425m": dict(hidden_size=1536, intermediate_size=6144, num_attention_heads=12, head_dim=128, num_hidden_layers=12),
    "1.5b": dict(hidden_size=2048, intermediate_size=8192, num_attention_heads=16, head_dim=128, num_hidden_layers=24),
    "7.5b": dict(hidden_size=4096, intermediate_size=16384, num_attention_heads=32, head_dim=128, num_hidden_layers=32),
}
PRESETS = tuple(_PRESETS)
_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "rope_theta", "max_position_embeddings", "chunk_len", "retrieved_len", "num_neighbors",
    "embedding_multiplier", "encoder_hidden_size", "encoder_intermediate_size", "encoder_num_attention_heads",
    "encoder_head_dim", "encoder_num_layers", "initializer_range", "rms_norm_eps",
)  # fmt: skip
_RANGES = {
    **dict.fromkeys(("vocab_size", "max_position_embeddings"), Annotated[int, Range(ge=1, le=1 << 31)]),
    **dict.fromkeys(("rope_theta", "embedding_multiplier", "initializer_range", "rms_norm_eps"), Positive),
    "encoder_num_layers": Annotated[int, Range(ge=0, le=1 << 20)],
    "num_neighbors": NumNeighbors,
}
MODERN = "-modern"


class CheckedFields:
    """For configurations: `checked` refuses a field that transformers would keep without a word."""

    @classmethod
    def checked(cls, **fields):
        """cls(**fields); ValueError for a field that is not one of the class, with the nearest that is."""
        for name in fields:
            if name not in cls.__dataclass_fields__:
                raise ValueError(unknown_name(name, cls.__dataclass_fields__, "model field"))
        try:
            return cls(**fields)
        except StrictDataclassError as error:
            raise ValueError(str(error.__cause__ or error).partition(" Errors: ")[0]) from None

    def require_sizes(self, *names: str) -> None:
        """Raise ValueError, naming the field, for a size or scale of 0 or less or beyond all reason, or fewer than 0
        encoder layers. None passes, which stands for a default."""
        for name in names:
            check_value(name, getattr(self, name), _RANGES.get(name, Size) | None)


@strict
class RetroConfig(CheckedFields, PreTrainedConfig):
    """Sizes and options of a RETRO; names are Hugging Face's where it has one.

    Args:
        vocab_size: Tokens in the vocabulary, which decoder and encoder share.
        hidden_size: Decoder width d.
        intermediate_size: Inner width of the decoder's feed-forward network; default 4 d.
        num_hidden_layers: Decoder layers.
        num_attention_heads: Query heads of self-attention and of CCA.
        num_key_value_heads: Key / value heads of the same; default `num_attention_heads`.
        head_dim: Head size; default d / heads. The inner width heads x size is independent of d.
        hidden_act: "gelu", "silu" or "relu".
        gated_feed_forward: Gated feed-forward networks. Differs: the paper's are ungated.
        position: "rotary", or "relative" for the paper's Transformer-XL form.
        rope_theta: Base of the rotary wavelengths.
        max_position_embeddings: Longest sequence in training; the window of evaluation. No table depends on it.
        chunk_len: Tokens in a chunk, m.
        retrieved_len: Tokens in a retrieved value [N, F], r.
        num_neighbors: Neighbors per chunk at inference, k, unless a call says otherwise.
        cca_layers: The layers P with chunked cross-attention, 1-based. Default: every third from 6, or the last layer
            of a shallower model. Empty: a plain language model, with neither CCA nor encoder.
        cca_partial_rotary_factor: Share of each CCA head's channels that rotary positions turn; the rest match by
            content alone. Differs: in the paper every logit has its position.
        smeared_keys: CCA's keys see the token before theirs (see ChunkedCrossAttention). Differs: not in the paper.
        cca_init: "random", or "induction" to start CCA as an induction head that copies what followed the current
            token in a neighbor (see RetroPreTrainedModel). Ours; it needs smeared keys, an encoder of the decoder's
            width that shares its embeddings, tied output embeddings and heads x size = d, and wants heads of 32
            channels or more, to tell tokens apart.
        embedding_multiplier: Token embeddings are multiplied by this on their way into decoder and encoder, not in the
            output embeddings. Default: 1, and sqrt(d) with the induction start, whose embeddings would otherwise drown
            in what training writes beside them (see RetroPreTrainedModel). Differs: the paper has none.
        encoder_hidden_size: Encoder width d_enc; default d.
        encoder_intermediate_size: Inner width of its feed-forward network; default 4 d_enc.
        encoder_num_layers: Encoder layers.
        encoder_num_attention_heads: Heads of the encoder; default `num_attention_heads`.
        encoder_head_dim: Their size; default `head_dim`.
        encoder_cross_attention_layers: P_enc, the encoder layers that read H_u, 1-based.
        encoder_shares_embeddings: The encoder reads the decoder's token embeddings, through a linear map where the
            widths differ.
        initializer_range: Standard deviation of the random weights.
        rms_norm_eps: Epsilon of RMSNorm.
        tie_word_embeddings: Output embeddings are the input embeddings.
    """

    model_type = "retro"

    vocab_size: int = 128_000
    hidden_size: int = 896
    intermediate_size: int | None = None
    num_hidden_layers: int = 12
    num_attention_heads: int = 16
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "gelu"
    gated_feed_forward: bool = False
    position: Literal["rotary", "relative"] = "rotary"
    rope_theta: float | int = 10_000.0
    max_position_embeddings: int = 2048
    chunk_len: int = 64
    retrieved_len: int = 128
    num_neighbors: int = 2
    cca_layers: list[int] | tuple[int, ...] | None = None
    cca_partial_rotary_factor: float | int = 1.0
    smeared_keys: bool = False
    cca_init: Literal["random", "induction"] = "random"
    embedding_multiplier: float | int | None = None
    encoder_hidden_size: int | None = None
    encoder_intermediate_size: int | None = None
    encoder_num_layers: int = 2
    encoder_num_attention_heads: int | None = None
    encoder_head_dim: int | None = None
    encoder_cross_attention_layers: list[int] | tuple[int, ...] = (1,)
    encoder_shares_embeddings: bool = False
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs):
        self.require_sizes(*_SIZES)
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.intermediate_size = self.intermediate_size or 4 * self.hidden_size
        self.encoder_hidden_size = self.encoder_hidden_size or self.hidden_size
        self.encoder_intermediate_size = self.encoder_intermediate_size or 4 * self.encoder_hidden_size
        self.encoder_num_attention_heads = self.encoder_num_attention_heads or self.num_attention_heads
        self.encoder_head_dim = self.encoder_head_dim or self.head_dim
        if self.embedding_multiplier is None:
            self.embedding_multiplier = self.hidden_size**0.5 if self.cca_init == "induction" else 1.0
        if self.cca_layers is None:
            self.cca_layers = default_cca_layers(self.num_hidden_layers)
        self.cca_layers = sorted(self.cca_layers)
        self.encoder_cross_attention_layers = sorted(self.encoder_cross_attention_layers)
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs) -> "RetroConfig":
        """As Hugging Face's. A saved model that names no multiplier was trained without one, whatever its start."""
        return super().from_dict({"embedding_multiplier": 1.0, **config_dict}, **kwargs)

    def validate_architecture(self):
        """Refuse sizes that do not fit together. Called by transformers after construction."""
        require_layers("cca_layers", self.cca_layers, self.num_hidden_layers)
        require_layers("encoder_cross_attention_layers", self.encoder_cross_attention_layers, self.encoder_num_layers)
        if self.retrieved_len < self.chunk_len:
            raise ValueError(
                f"retrieved_len is {self.retrieved_len}, below chunk_len {self.chunk_len}; "
                "a retrieved value starts with a whole neighbor chunk."
            )
        if not 0 <= self.cca_partial_rotary_factor <= 1:
            raise ValueError(f"cca_partial_rotary_factor is {self.cca_partial_rotary_factor}; give 0 to 1.")
        if self.position == "relative" and self.cca_partial_rotary_factor != 1:
            raise ValueError("cca_partial_rotary_factor needs position='rotary'; leave it at 1 with 'relative'.")
        if self.cca_init == "induction":
            self._validate_induction()

    def _validate_induction(self):
        inner = self.num_attention_heads * self.head_dim
        wanted = {
            "smeared_keys": (self.smeared_keys, True),
            "encoder_shares_embeddings": (self.encoder_shares_embeddings, True),
            "encoder_hidden_size": (self.encoder_hidden_size, self.hidden_size),
            "num_attention_heads * head_dim": (inner, self.hidden_size),
            "num_key_value_heads": (self.num_key_value_heads, self.num_attention_heads),
            "tie_word_embeddings": (self.tie_word_embeddings, True),
        }
        for name, (value, needed) in wanted.items():
            if value != needed:
                raise ValueError(f"cca_init is 'induction' and {name} is {value}; the induction start needs {needed}.")

    @classmethod
    def from_preset(cls, name: str, **overrides) -> "RetroConfig":
        """A model of a size of the paper's Table 2, `overrides` applied.

        name: "172m", "425m", "1.5b" or "7.5b" for the paper's form (relative positions, random start, an encoder of
            2 x 896); with "-modern" behind it for ours: rotary positions, the induction start, and what it needs, an
            encoder of one layer as wide as the decoder that shares its embeddings, and heads x size = d.

        Raises ValueError for an unknown preset or field.
        """
        size = name.removesuffix(MODERN)
        if size not in _PRESETS:
            raise ValueError(
                f"Unknown preset {name!r}; choose one of {', '.join(PRESETS)}, or one of them with {MODERN} behind it."
            )
        form = _PAPER_FORM if name == size else _modern_form(**_PRESETS[size])
        return cls.checked(**{**_PRESETS[size], **form, **overrides})


_PAPER_FORM = dict(encoder_hidden_size=896, encoder_num_attention_heads=16, encoder_head_dim=64, position="relative")


def _modern_form(hidden_size: int, head_dim: int, **_) -> dict:
    return dict(
        position="rotary",
        num_attention_heads=hidden_size // head_dim,
        encoder_num_layers=1,
        encoder_shares_embeddings=True,
        smeared_keys=True,
        cca_init="induction",
        cca_partial_rotary_factor=0.0,
    )


def default_cca_layers(num_layers: int) -> list[int]:
    """Every third layer from 6, as in the paper; the last layer where there are fewer than 6."""
    return list(range(6, num_layers + 1, 3)) or [num_layers]


def require_layers(field: str, layers: Sequence[int], num_layers: int) -> None:
    """Raise ValueError, naming the field, for a layer that is not there or is named twice."""
    if len(set(layers)) < len(layers):
        raise ValueError(f"{field} is {list(layers)}; name each layer once.")
    for layer in layers:
        if not 1 <= layer <= num_layers:
            raise ValueError(f"{field} has {layer}; layers are counted from 1 to {num_layers}.")
