"""RetrofitConfig: the base, and the sizes of what is added to it."""

from collections.abc import Sequence
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from retro.model.config import CheckedFields, require_layers

MATCHING = ("key_layer", "key_lags")
OF_LAYERS = (
    *("encoder_intermediate_size", "encoder_num_attention_heads", "encoder_head_dim"),
    "encoder_cross_attention_layers",
)
PAPER = ("start", "cca_layers", "encoder_hidden_size", "encoder_num_layers", *OF_LAYERS, "initializer_range")
RANDOM_START = ("encoder_shares_embeddings", "gate")
POSITIVE = (
    *("chunk_len", "retrieved_len", "num_neighbors", "rms_norm_eps", "encoder_hidden_size"),
    *("encoder_intermediate_size", "encoder_num_attention_heads", "encoder_head_dim", "initializer_range"),
)
KEY_LAGS = 10
OF_BASE = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("max_position_embeddings", "tie_word_embeddings"),
)


class _Parts:
    """What transformers calls `sub_configs`: what is set for the whole holds for the base too."""

    def __get__(self, config, kind) -> dict[str, type]:
        from transformers import AutoConfig  # which asks for this module

        return {"base_config": AutoConfig}


def _of_base(name: str, default: Any = None) -> property:
    """A field of the base's own configuration; the default where it has none."""

    def read(config):
        return getattr(config._text, name, default)

    def write(config, value):
        setattr(config._text, name, value)

    return property(read, write, doc="The base's.")


@strict
class RetrofitConfig(CheckedFields, PreTrainedConfig):
    """Sizes and options of a RETRO-fitted model. What is None comes from the base.

    Args:
        base_config: The base's own configuration.
        base_name_or_path: Where the base is loaded from again: a Hugging Face name, a folder, a GGUF file or
            "package:NAME" (see `open_base`). None: the folder of the fitted model holds the base too.
        base_revision: The revision of that name.
        base_dtype: The base's type when it was fitted, in which it is loaded again.
        base_fingerprint: What tells the base's weights from others, see retro.retrofit.fingerprint.
        base_adapters: PEFT's configuration of the adapter that the base carries, by its name.
        form: What is added, and where: "joint", "pointer" or "paper", see retro.retrofit.forms. The fields below are
            refused beside a form, or a start, that does not have them.
        chunk_len, retrieved_len, num_neighbors: m, r and k, as in RetroConfig.
        rms_norm_eps: Epsilon of the added RMSNorms; default the base's, or 1e-6.

    Matching:
        key_layer: The layer whose output, of text and neighbors, is compared; default a fifth of the layers.
        key_lags: How many tokens before the compared ones count too; fewer than chunk_len, default 10 if so.

    The paper form:
        start: "reading", where CCA finds and reads what followed before it is trained, or "random": the paper's
            encoder and CCA with random weights, of which the pointer knows nothing.
        cca_layers: The layers P with chunked cross-attention, 1-based; or "middle", one layer halfway. Default with the
            reading start: the last, and those at 4/5 and 9/10 of the depth; with the random one every third layer from
            6 in a base of 12 layers or more, and in a shallower one every third from the middle.
        encoder_num_layers: Encoder layers; with the reading start they stand on the base's own up to `key_layer`.
            Default: 2 with the random start, with the reading one none: the base's own are then the encoder.
        encoder_intermediate_size: Inner width of their feed-forward networks; default 4 d_enc.
        encoder_num_attention_heads, encoder_head_dim: Heads of the encoder.
        encoder_cross_attention_layers: P_enc, the encoder layers that read H_u, 1-based; default the first.
        initializer_range: Standard deviation of the random weights.

    The random start:
        encoder_hidden_size: Encoder width d_enc; default, and always with the reading start, the base's.
        encoder_shares_embeddings: The encoder reads the base's token embeddings, through a linear map where widths
            differ.
        gate: CCA's output is scaled by tanh of one number ("scalar") or of one per channel, 0 at the start.
    """

    model_type = "retrofit"
    sub_configs = _Parts()
    vocab_size = _of_base("vocab_size")
    hidden_size = _of_base("hidden_size")
    num_hidden_layers = _of_base("num_hidden_layers")
    max_position_embeddings = _of_base("max_position_embeddings")  # None: no limit
    tie_word_embeddings = _of_base("tie_word_embeddings", False)

    base_config: dict | PreTrainedConfig | None = None
    base_name_or_path: str | None = None
    base_revision: str | None = None
    base_dtype: str | None = None
    base_fingerprint: dict[str, float] | None = None
    base_adapters: dict[str, dict] | None = None
    form: str = "joint"
    chunk_len: int = 64
    retrieved_len: int = 128
    num_neighbors: int = 2
    rms_norm_eps: float | int | None = None
    key_layer: int | None = None
    key_lags: int | None = None
    start: Literal["reading", "random"] = "reading"
    cca_layers: list[int] | tuple[int, ...] | str | None = None
    encoder_num_layers: int | None = None
    encoder_intermediate_size: int | None = None
    encoder_num_attention_heads: int | None = None
    encoder_head_dim: int | None = None
    encoder_cross_attention_layers: list[int] | tuple[int, ...] | None = None
    encoder_hidden_size: int | None = None
    encoder_shares_embeddings: bool = True
    gate: Literal["scalar", "channel"] = "scalar"
    initializer_range: float | int = 0.02
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs):
        self.require_sizes(*POSITIVE, "encoder_num_layers")
        if self.base_config is not None:
            self._take_from_base()
        for name in OF_BASE:
            if kwargs.pop(name, own := getattr(self, name, None)) != own:
                raise ValueError(f"{name} is given, but it is the base's, {own}; change the base.")
        super().__post_init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        """As Hugging Face's, with the base's sizes, which tools look for here; they are not read again."""
        return super().to_dict() | {name: getattr(self, name, None) for name in OF_BASE}

    def _take_from_base(self) -> None:
        if isinstance(self.base_config, dict):
            self.base_config = config_of(self.base_config)
        text = self.base_config.get_text_config()
        if self.matches:
            self.key_layer = max(1, round(text.num_hidden_layers / 5)) if self.key_layer is None else self.key_layer
            self.key_lags = min(KEY_LAGS, self.chunk_len - 1) if self.key_lags is None else self.key_lags
        if self.form in ("paper", "joint"):
            self._take_sizes(text)
        self.rms_norm_eps = self.rms_norm_eps or getattr(text, "rms_norm_eps", None) or 1e-6
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            if getattr(self, name) is None:
                setattr(self, name, getattr(text, name, None))

    def _take_sizes(self, text: PreTrainedConfig) -> None:
        """Layers and sizes of the paper's form."""
        self.cca_layers = chosen_layers(self.cca_layers, text.num_hidden_layers, self.start)
        own_size = self.encoder_hidden_size in (None, text.hidden_size)
        self.encoder_hidden_size = self.encoder_hidden_size or text.hidden_size
        if self.encoder_num_layers is None:
            self.encoder_num_layers = 0 if self.start == "reading" else 2
        if self.encoder_num_layers == 0:
            return
        if own_size:
            heads, head_dim = attention_sizes(text)[::2]
            self.encoder_num_attention_heads = self.encoder_num_attention_heads or heads
            self.encoder_head_dim = self.encoder_head_dim or head_dim
        self.encoder_head_dim = self.encoder_head_dim or min(64, self.encoder_hidden_size)
        self.encoder_num_attention_heads = self.encoder_num_attention_heads or max(
            1, self.encoder_hidden_size // self.encoder_head_dim
        )
        self.encoder_intermediate_size = self.encoder_intermediate_size or 4 * self.encoder_hidden_size
        conditioned = self.encoder_cross_attention_layers
        self.encoder_cross_attention_layers = [1] if conditioned is None else sorted(conditioned)

    def validate_architecture(self):
        """Refuse sizes that do not fit together. Called by transformers after construction."""
        self._refuse_idle_fields()
        if self.matches:
            self._check_matching()
        if self.form in ("paper", "joint"):
            self._check_paper()
        if self.retrieved_len < self.chunk_len:
            raise ValueError(
                f"retrieved_len is {self.retrieved_len}, below chunk_len {self.chunk_len}; "
                "a retrieved value starts with a whole neighbor chunk."
            )

    def _refuse_idle_fields(self) -> None:
        """Fields of another form, of another start of the paper's, or of layers that are not there."""
        if self.form == "pointer":
            self._require_defaults((*PAPER, *RANDOM_START), "form is 'pointer'; it belongs to form='paper'")
        elif self.form == "joint":
            self._require_defaults(("start",), "form is 'joint'; it belongs to form='paper'")
            self._require_defaults(RANDOM_START, "form is 'joint'; it belongs to form='paper' with start='random'")
        elif self.form == "paper" and self.start == "reading":
            self._require_defaults(RANDOM_START, "start is 'reading'; it belongs to start='random'")
        elif self.form == "paper":
            self._require_defaults(MATCHING, "start is 'random'; it belongs to start='reading'")
        if self.encoder_num_layers == 0:
            idle = OF_LAYERS if self.start == "random" else (*OF_LAYERS, "initializer_range")
            self._require_defaults(idle, "the encoder has no layers; it needs encoder_num_layers")

    def _require_defaults(self, names: Sequence[str], reason: str) -> None:
        for name in names:
            default, value = getattr(type(self), name), getattr(self, name)
            if value != default:
                raise ValueError(f"{name} is {value!r}, but {reason}.")

    def _check_matching(self) -> None:
        if self.base_config is not None:
            require_layers("key_layer", [self.key_layer], self.num_hidden_layers)
            positions = self.max_position_embeddings
            if positions and self.retrieved_len > positions:
                raise ValueError(
                    f"retrieved_len is {self.retrieved_len}, but the base, which reads each neighbor, has {positions} "
                    f"positions; give {positions} or fewer."
                )
        if self.key_lags is not None and not 0 <= self.key_lags < self.chunk_len:
            raise ValueError(
                f"key_lags is {self.key_lags}; it must be 0 or more, and less than chunk_len {self.chunk_len}."
            )

    def _check_paper(self) -> None:
        if self.base_config is not None:
            conditioned = self.encoder_cross_attention_layers or ()
            require_layers("encoder_cross_attention_layers", conditioned, self.encoder_num_layers)
            require_layers("cca_layers", self.cca_layers, self.num_hidden_layers)
            if self.start == "reading" and self.encoder_hidden_size != self.hidden_size:
                raise ValueError(
                    f"encoder_hidden_size is {self.encoder_hidden_size}, but start is 'reading', which needs the "
                    f"base's {self.hidden_size}; leave it out, or take form='paper' with start='random'."
                )
            if not self.cca_layers:
                raise ValueError("cca_layers is empty, so that nothing could read the neighbors; name a layer.")

    @property
    def matches(self) -> bool:
        """Whether the base's own features are compared; all but the random start do."""
        return self.form in ("pointer", "joint") or (self.form == "paper" and self.start == "reading")

    def get_text_config(self, *args, **kwargs) -> PreTrainedConfig:
        """The base's."""
        return super().get_text_config(*args, **kwargs) if self.base_config is None else self._text

    @property
    def num_attention_heads(self) -> int:
        """The base's."""
        return attention_sizes(self._text)[0]

    @property
    def num_key_value_heads(self) -> int:
        """The base's."""
        return attention_sizes(self._text)[1]

    @property
    def head_dim(self) -> int:
        """The base's."""
        return attention_sizes(self._text)[2]

    @property
    def _text(self) -> PreTrainedConfig:
        if self.base_config is None:
            raise AttributeError("this RetrofitConfig has no base_config")
        return self.base_config.get_text_config()


def chosen_layers(wanted: Sequence[int] | str | None, num_layers: int, start: str) -> list[int]:
    """The layers of P: as given, "middle", or by default those of the start."""
    if wanted is None and start == "reading":
        return sorted({max(1, round(num_layers * share)) for share in (0.8, 0.9, 1.0)})
    if wanted is None:
        return list(range(6 if num_layers >= 12 else (num_layers + 1) // 2, num_layers + 1, 3))
    if isinstance(wanted, str):
        if wanted != "middle":
            raise ValueError(f"cca_layers is {wanted!r}; give layers from 1 to {num_layers}, or 'middle'.")
        return [(num_layers + 1) // 2]
    return sorted(set(wanted))


def attention_sizes(base_config: PreTrainedConfig) -> tuple[int, int, int]:
    """Query heads, key / value heads and head size of a base, as far as its configuration says."""
    heads = getattr(base_config, "num_attention_heads", None) or 1
    kv_heads = getattr(base_config, "num_key_value_heads", None) or heads
    head_dim = getattr(base_config, "head_dim", None) or base_config.hidden_size // heads
    return heads, kv_heads if heads % kv_heads == 0 else heads, head_dim


def config_of(fields: dict[str, Any]) -> PreTrainedConfig:
    """A base's configuration from its saved fields; ValueError for a model type that transformers does not know."""
    from transformers import CONFIG_MAPPING

    model_type = fields.get("model_type")
    if model_type not in CONFIG_MAPPING:
        raise ValueError(f"base_config has the model type {model_type!r}, which transformers does not know.")
    return CONFIG_MAPPING[model_type].from_dict(fields)
