"""RetrofitForCausalLM: a frozen pretrained causal LM that reads neighbors."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import TransformersKwargs, can_return_tuple

from retro.common.records import forget_sums
from retro.common.settings import unknown_name
from retro.model import RetroCache
from retro.model.cache import cache_for
from retro.model.fixed import FixedStep
from retro.model.padding import Alignment
from retro.model.step import on_device
from retro.modules.cross_attention import checked_neighbors
from retro.modules.encoder import chunks_of
from retro.modules.loss import check_text, check_tokens, linear_cross_entropy, of_items, targets_of
from retro.retrofit.anatomy import find_anatomy, is_empty, without_peft
from retro.retrofit.bases import random_base
from retro.retrofit.caching import check_cache, positions_of
from retro.retrofit.config import RetrofitConfig
from retro.retrofit.forms import Mixture, form_class
from retro.retrofit.generation import RetrofitGeneration
from retro.retrofit.hooks import HookPoint, RetrofitContext, active, add_hooks, bind_checkpoints, stream_at
from retro.retrofit.loss import head_inputs, head_is_plain, mixed_loss, plain_loss, refuse_fused_head, with_gradient
from retro.retrofit.matching import check_neighbor_mask, neighbor_features
from retro.retrofit.outputs import last_logits, output_of
from retro.retrofit.packing import is_packed, packed_inputs, packing_way
from retro.retrofit.saving import prepare_save
from retro.retrofit.starts import observe


class RetrofitForCausalLM(RetrofitGeneration, PreTrainedModel, GenerationMixin):
    """A base and a form (see retro.retrofit.forms), which holds every new weight.

    `RetrofitForCausalLM(config)` makes a base of random weights; see `retrofit` and `from_pretrained`. Without
    `start` the new weights are left as memory holds them, for others to be loaded; so they are on the meta device.

    Source: RETRO, section B.2.
    """

    config_class = RetrofitConfig
    base_model_prefix = "base"
    main_input_name = "input_ids"
    _supports_sdpa = True
    accepts_loss_kwargs = True  # a Trainer gives num_items_in_batch

    def __init__(self, config: RetrofitConfig, base: PreTrainedModel | None = None, start: bool = True):
        attention = config._attn_implementation  # as it was asked for: the next line puts a default in its place
        super().__init__(config)
        if config.base_config is None:
            raise ValueError("base_config is None; make a RetrofitForCausalLM with retrofit(base, ...).")
        if base is None:
            base = random_base(config.base_config, attention)
            self.config.base_config = base.config
        self.base = base.requires_grad_(False)
        self.config._attn_implementation = self.base.config._attn_implementation
        self.anatomy = find_anatomy(self.base, config.cca_layers or [])
        self.form = form_class(config.form)(config, self.base, self.anatomy)
        self.supports_gradient_checkpointing = self.base.supports_gradient_checkpointing
        self._no_split_modules = self.base._no_split_modules
        if hasattr(self.base, "generation_config"):
            self.generation_config = copy.deepcopy(self.base.generation_config)
        self._key = _HookKey()
        self._is_joined = False
        if not is_empty(self.base):
            self._join()
            if start:
                self.start()
        self.training = self.base.training
        self.form.train(self.training)
        self.post_init()

    def _join(self) -> None:
        """Find, by small runs, how the base works, and put the hooks in; once, as soon as it has weights."""
        if self._is_joined:
            return
        if self.anatomy.writers.keys() != set(self.config.cca_layers or []):
            self.anatomy = find_anatomy(self.base, self.config.cca_layers)
        ends = [HookPoint(layer, "end") for layer in range(1, self.anatomy.num_layers + 1)]  # see hidden_after
        add_hooks(self.base, self.anatomy, sorted({*self.form.hook_points, *ends}), self._key)
        self._packing_way = packing_way(self.base)
        self._head_is_plain = head_is_plain(self.base)
        self._is_joined = True

    def start(self, text: Int[Tensor, "q n"] | None = None) -> None:
        """Give the new weights their start, from what the base makes of a text of its own kind.

        Without a text random tokens serve. Maps between the base's layers are far better from text: of some 16,000
        tokens they are good, of four times fewer noticeably less so.
        """
        self._join()
        self.form.start(observe(self.base, self.anatomy, self.config, self.form.start_points, text))

    @can_return_tuple
    def forward(
        self,
        input_ids: Int[Tensor, "b n"] | None = None,
        neighbor_ids: Int[Tensor, "b l k r"] | None = None,
        neighbor_mask: Bool[Tensor, "b l k r"] | None = None,
        labels: Int[Tensor, "b n"] | None = None,
        attention_mask: Tensor | None = None,
        document_ids: Int[Tensor, "b n"] | None = None,
        return_logits: bool | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        inputs_embeds: Float[Tensor, "b n d"] | None = None,
        fixed: FixedStep | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Logits and, with labels, the mean loss in nats, in one of three ways::

            no neighbors, no documents, no RetroCache    the base's own forward: RETRO[OFF], bit for bit
            with a cache, given or asked for             `_forward_cached`: new tokens after those that it has seen
            otherwise                                    `_forward_whole`: whole rows

        Args:
            input_ids: Tokens. Rows may be padded left or right where `attention_mask` says so; with neighbors, chunks
                are counted, and positions start, from each row's first real token.
            neighbor_ids: Tokens of the k neighbors [N, F] of each whole chunk, l = n // chunk_len; None is RETRO[OFF].
            neighbor_mask: True = a real token; a neighbor with no True is missing. Default: all real.
            labels: As in Hugging Face: shifted inside, -100 ignored.
            attention_mask: 1 = a real token.
            document_ids: For packed documents, each in one run: tokens attend inside their document only, whose
                positions start at 0, and a token reads E_u only if all of C_u is in its document.
            return_logits: Default: unless training with neighbors and labels. Without logits the loss is computed in
                slices where the base's output embeddings allow it.
            past_key_values: With neighbors, what `use_cache` gave for the tokens before these, or a new RetroCache.
                `attention_mask` is then for all tokens so far, padded on the left only; `neighbor_ids` holds, for each
                row, the neighbors of the chunks that these tokens complete (None: they have none).
            use_cache: Whether to give `past_key_values`. Default: with neighbors if some are given, else the base's.
            num_items_in_batch: Labels over which the mean is taken, see RetroForCausalLM.forward.
            inputs_embeds: Embeddings in place of `input_ids`.
            fixed: From generate() with a static cache: what goes with `input_ids`, in place of neighbors and cache.
            kwargs: As the base takes them: position_ids, logits_to_keep ...; shift_labels as RetroForCausalLM does.

        Raises ValueError for what does not fit together, and for arguments that the base does not name.
        """
        if fixed is not None:
            return self._forward_fixed({"input_ids": input_ids, "attention_mask": attention_mask, **kwargs}, fixed)
        if neighbor_ids is None and neighbor_mask is not None:
            raise ValueError("neighbor_mask is given without neighbor_ids.")
        if neighbor_mask is not None and self.config.matches:
            check_neighbor_mask(neighbor_mask)
        shift_labels = kwargs.pop("shift_labels", None)
        check_text(input_ids, inputs_embeds, labels=labels, shift_labels=shift_labels)
        tokens = {"input_ids": input_ids, "neighbor_ids": neighbor_ids, "labels": labels, "shift_labels": shift_labels}
        check_tokens(self.config.vocab_size, neighbor_mask, **tokens)
        refuse_fused_head(self)
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, **self._checked(kwargs)}
        inputs |= {"return_dict": True} | ({} if inputs_embeds is None else {"inputs_embeds": inputs_embeds})
        has_retro_cache = isinstance(past_key_values, RetroCache)
        if neighbor_ids is None and document_ids is None and return_logits is None and not has_retro_cache:
            caching = {"past_key_values": past_key_values, "use_cache": use_cache}
            caching = {name: value for name, value in caching.items() if value is not None}
            if shift_labels is not None:  # which not every base knows
                outputs = self.base(**inputs, **caching)
                outputs.loss = of_items(plain_loss(outputs.logits, shift_labels), shift_labels, num_items_in_batch)
            else:
                if labels is not None and num_items_in_batch is not None:
                    caching["num_items_in_batch"] = num_items_in_batch
                outputs = self.base(**inputs, **caching, labels=labels)
            return with_gradient(outputs, self.form, has_neighbors=False)
        self._join()
        cache = cache_for(past_key_values, use_cache, document_ids, self.config.chunk_len, with_prefix=False)
        rows = Alignment(attention_mask if cache is None else None)
        targets = targets_of(*rows.left(labels, shift_labels))
        if return_logits is None:
            return_logits = targets is None or not self.training
        given = neighbor_ids, neighbor_mask, targets, return_logits
        if cache is not None:
            outputs = self._forward_cached(inputs, cache, *given)
        else:
            outputs = self._forward_whole(inputs, rows, document_ids, *given)
        if targets is not None:
            outputs.loss = of_items(outputs.loss, targets, num_items_in_batch)
        return with_gradient(outputs, self.form, has_neighbors=neighbor_ids is not None)

    def _checked(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments for the base, with what the configuration asks for; ValueError for one that it would swallow."""
        if kwargs:
            base = without_peft(self.base)
            named = inspect.signature(base.forward).parameters.keys() | TransformersKwargs.__annotations__.keys()
            for name in kwargs.keys() - named:
                known = [*inspect.signature(self.forward).parameters, *named]
                raise ValueError(unknown_name(name, known, "argument of forward"))
        asked = {name: True for name in ("output_hidden_states", "output_attentions") if getattr(self.config, name)}
        return asked | {name: value for name, value in kwargs.items() if value is not None or name not in asked}

    def _forward_whole(
        self, inputs, rows: Alignment, document_ids, neighbor_ids, neighbor_mask, targets, return_logits: bool
    ) -> CausalLMOutputWithPast:
        """The base over rows aligned left, and the logits where each row has its tokens.

        Without logits the base's head sees one token of each row only, and the loss is computed in slices.
        """
        keep, document_ids = inputs.pop("logits_to_keep", 0), rows.left(document_ids)[0]
        inputs |= {name: rows.left(inputs[name])[0] for name in _PER_TOKEN if inputs.get(name) is not None}
        context = self._context(inputs, neighbor_ids, neighbor_mask, document_ids)
        if context is not None and self.config.matches and torch.compiler.is_exporting():
            neighbor_features(context, self.config.key_layer)  # a graph runs the base twice, never inside of itself
        inputs |= self._masks(inputs.pop("attention_mask"), document_ids) | {"use_cache": False}
        if not return_logits and self._head_is_plain:
            with active(context):
                hidden, _ = head_inputs(self.base, shorten=True, **inputs)
            return CausalLMOutputWithPast(loss=None if targets is None else self._sliced_loss(hidden, targets, context))
        if targets is None and not rows.is_turned:
            inputs |= last_logits(keep)
        with active(context):
            outputs = self.base(**inputs)
        loss, logits = self._loss_and_logits(outputs.logits, self._mixture(context), targets, return_logits)
        logits = None if logits is None else rows.right(logits)
        return output_of(outputs, loss, logits, keep, rows=rows)

    def _forward_cached(
        self, inputs, cache: RetroCache, neighbor_ids, neighbor_mask, targets, return_logits: bool
    ) -> CausalLMOutputWithPast:
        """The base over new tokens, with its own cache inside the RetroCache."""
        if self._drops_caches:
            raise ValueError(
                "use_cache is true, but a base in training with gradient checkpointing drops its cache; leave it out, "
                "or call eval() first."
            )
        tokens = inputs.get("inputs_embeds") if inputs["input_ids"] is None else inputs["input_ids"]
        step = cache.begin(*tokens.shape[:2], inputs["attention_mask"])
        cache.set_neighbors(step, neighbor_ids, neighbor_mask, tokens.device)
        check_cache(self.base, cache.attention, step, cache.length, any(cache.padding))
        if inputs.get("position_ids") is None:
            padding = on_device(cache.padding, tokens.device)
            inputs |= positions_of(self.base, padding, cache.length, step.length)
        keep = inputs.pop("logits_to_keep", 0)
        last = last_logits(keep) if targets is None else {}
        inputs |= {"past_key_values": cache.attention, "use_cache": True} | last
        context = self._new_context(cache=cache, step=step, keep=last.get("logits_to_keep"))
        with active(context):
            outputs = self.base(**inputs)
        if outputs.get("past_key_values") is None:
            raise ValueError(f"{type(self.base).__name__} gives no key / value cache; run it with use_cache=False.")
        cache.attention = outputs.past_key_values
        mixture = self._mixture(context)
        cache.end(step, inputs.get("input_ids"))
        logits = outputs.logits[:, -keep:] if last else outputs.logits
        loss, logits = self._loss_and_logits(logits, mixture, targets, return_logits)
        return output_of(outputs, loss, logits, keep, cache=cache)

    def _loss_and_logits(
        self, logits: Float[Tensor, "b n v"], mixture: Mixture | None, targets, return_logits: bool
    ) -> tuple[Float[Tensor, ""] | None, Float[Tensor, "b n v"] | None]:
        """The loss, if there are targets, and the logits, if they are wanted, of the base or of its mixture."""
        loss = None
        if targets is not None and mixture is None:
            loss = plain_loss(logits, targets)
        elif targets is not None:
            loss = mixed_loss(mixture, targets, logits.shape[-1], lambda part: logits[:, part])
        if not return_logits:
            return loss, None
        return loss, logits if mixture is None else mixture.edit(logits)

    def _mixture(self, context: RetrofitContext | None) -> Mixture | None:
        return None if context is None else self.form.mixture(context)

    def _sliced_loss(
        self, hidden: Float[Tensor, "b n d"], targets: Int[Tensor, "b n"], context: RetrofitContext | None
    ) -> Float[Tensor, ""]:
        head, mixture = self.base.get_output_embeddings(), self._mixture(context)
        if mixture is not None:
            return mixed_loss(mixture, targets, head.weight.shape[0], lambda part: head(hidden[:, part]))
        weight = head.weight
        return linear_cross_entropy(hidden.flatten(0, 1).to(weight), weight, targets.to(hidden.device).flatten())

    def _masks(self, attention_mask, document_ids) -> dict[str, Tensor]:
        """What keeps the documents of a row apart, or the mask as it is."""
        if not is_packed(document_ids):
            return {} if attention_mask is None else {"attention_mask": attention_mask}
        if attention_mask is not None:  # padding stands at the end, where no document goes on after it
            document_ids = document_ids.masked_fill(attention_mask == 0, int(document_ids.max()) + 1)
        return packed_inputs(self.base, self._packing_way, document_ids)

    def _context(self, inputs, neighbor_ids, neighbor_mask, document_ids) -> RetrofitContext | None:
        """What the hooks read over whole rows; None where there is no neighbor to read."""
        if neighbor_ids is None:
            return None
        tokens = inputs.get("inputs_embeds") if inputs["input_ids"] is None else inputs["input_ids"]
        m, attention_mask = self.config.chunk_len, inputs["attention_mask"]
        neighbor_ids, neighbor_mask = checked_neighbors(neighbor_ids, neighbor_mask, *tokens.shape[:2], m)
        bind_checkpoints(self.base)
        if neighbor_ids.numel() == 0:
            return None
        condition_mask = None if attention_mask is None else chunks_of(attention_mask.bool()[..., None], m)[..., 0]
        return self._new_context(
            neighbor_ids=neighbor_ids,
            neighbor_mask=neighbor_mask,
            document_ids=document_ids,
            condition_mask=condition_mask,
        )

    def _new_context(self, **given) -> RetrofitContext:
        return RetrofitContext(
            form=self.form, key=self._key, embed=self._embed, hidden_after=self.hidden_after, **given
        )

    def _embed(self, ids: Int[Tensor, "*s"]) -> Float[Tensor, "*s d"]:
        embedding = self.base.get_input_embeddings()
        with torch.no_grad():
            return embedding(ids.to(embedding.weight.device))

    def hidden_after(self, ids: Int[Tensor, "q r"], mask: Bool[Tensor, "q r"], layer: int) -> Float[Tensor, "q r d"]:
        """The base's residual stream after a layer, for texts read alone and without neighbors; no gradient."""
        return stream_at(HookPoint(layer, "end"), self.base, self._key, ids, mask)

    @property
    def _drops_caches(self) -> bool:
        """Whether the base's layers, by transformers' way of checkpointing, would forget what came before."""
        return self.base.training and self.is_gradient_checkpointing

    # Weights: which are new, and how they are kept

    def trainable_share(self) -> tuple[int, int]:
        """Weights that are trained, and all."""
        counts = [(p.numel(), p.requires_grad) for p in self.parameters()]
        return sum(n for n, trained in counts if trained), sum(n for n, _ in counts)

    def print_trainable_parameters(self) -> None:
        """One line, as PEFT prints it."""
        trained, total = self.trainable_share()
        print(f"trainable params: {trained:,} || all params: {total:,} || trainable%: {100 * trained / total:.4f}")

    def save_pretrained(self, save_directory: str | Path, state_dict: dict[str, Tensor] | None = None, **kwargs):
        """Write the new weights, and where the base is; its own too, where it was changed or has no place.

        Raises ValueError for what could not be loaded again: adapters of others, a quantized base that was changed.
        """
        weights = self.state_dict() if state_dict is None else state_dict
        weights = prepare_save(self, weights, save_directory, kwargs)
        forget_sums(save_directory)
        super().save_pretrained(save_directory, state_dict=weights, **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path | None,
        *args,
        base: Any = None,
        config: RetrofitConfig | None = None,
        state_dict: dict[str, Tensor] | None = None,
        dtype: Any = None,
        output_loading_info: bool = False,
        **kwargs,
    ) -> Any:
        """A fitted model from its folder; the base is loaded again, in the type it had.

        Args:
            pretrained_model_name_or_path: A folder that `save_pretrained` wrote, or a name on the hub.
            base: The base itself, or its place. Default: what the folder names, there or beside it, or the folder.
            config, state_dict: In place of the folder's; with both there need be no folder (None).
            dtype: Of the base. The new weights keep the type they were saved in.
            output_loading_info: Give a pair, of the model and what Hugging Face tells of weights: all are there.
            kwargs: revision and subfolder are the folder's; cache_dir, token ... are for both; all else is for the
                base: device_map, attn_implementation ...

        Raises ValueError for a base that is missing or another than the one that was fitted, for weights that do not
        fit, and for use_safetensors=False.
        """
        from retro.retrofit import loading

        find, options = loading.split_options(kwargs)
        config, weights = loading.read_fit(pretrained_model_name_or_path, find, options, config, state_dict)
        folder = str(Path(pretrained_model_name_or_path or "state_dict", find.get("subfolder", "")))
        dtype = dtype or kwargs.get("torch_dtype")
        options |= {} if dtype is None else {"dtype": dtype}
        base = loading.open_fitted_base(config, base, weights, folder, options)
        model = cls(config, base=base, start=False).eval()
        loading.load_new_weights(model, folder, weights)
        loading.load_generation_config(model, pretrained_model_name_or_path, find)
        return (model, loading.nothing_missing()) if output_loading_info else model

    # What Hugging Face asks of a model

    def get_input_embeddings(self) -> nn.Module:
        return self.base.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.base.get_output_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """The base's."""
        self.base.set_input_embeddings(value)

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.base.set_output_embeddings(new_embeddings)
        self._head_is_plain = head_is_plain(self.base)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Module:
        """The base's, which save_pretrained then writes too, and the encoder's own embeddings, where it has some."""
        embeddings = self.base.resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        own = getattr(getattr(self.form, "paper", self.form), "encoder_embedding", None)
        if isinstance(own, nn.Embedding):
            self._get_resized_embeddings(own, len(embeddings.weight), mean_resizing=mean_resizing)
        self.config.vocab_size = self.vocab_size = self.base.config.get_text_config().vocab_size
        return embeddings

    def set_attn_implementation(self, *args, **kwargs) -> None:
        """The base's attention; what is added always runs the fused kernel."""
        self.base.set_attn_implementation(*args, **kwargs)
        self.config._attn_implementation = self.base.config._attn_implementation

    def enable_input_require_grads(self) -> None:
        """Nothing: gradients start at the first place that is written to, and none are wanted below it."""

    def tie_weights(self, *args, **kwargs) -> None:
        """Nothing: the base has tied its own."""

    def init_weights(self) -> None:
        """The base's and the form's start, for a model that was made on the meta device and has just left it."""
        if not self._is_joined and not is_empty(self.base):
            self.base.init_weights()
            self.start()


class _HookKey:
    """Whose hooks are whose; equal only to itself, and copied together with its model."""


_PER_TOKEN = ("input_ids", "inputs_embeds", "position_ids", "attention_mask")
