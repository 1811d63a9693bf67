"""RetroForCausalLM: a decoder that attends to the neighbors of every chunk, as a Hugging Face model."""

import inspect
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from retro.common.settings import unknown_name
from retro.model.cache import GrowingLayer, RetroCache, cache_for, retro_cache
from retro.model.config import RetroConfig
from retro.model.fixed import FixedRows, FixedStep
from retro.model.generation import RetrievalGeneration, refuse_assisted
from retro.model.padding import Alignment
from retro.model.start import FinalNorm, RetroPreTrainedModel
from retro.model.step import CachedStep, on_device
from retro.modules import DecoderBlock, NeighborEncoder
from retro.modules.attention import PastKeyValues, attendable
from retro.modules.cross_attention import ReadChunks, checked_neighbors, read_chunks
from retro.modules.encoder import chunks_of
from retro.modules.kernels import RELATIVE_QUERIES, QueryBlock, has_fixed_shapes, query_blocks, uses_flex
from retro.modules.loss import check_text, check_tokens, linear_cross_entropy, of_items, targets_of
from retro.modules.positions import rotary_table


class RetroModel(RetroPreTrainedModel):
    """Embeddings, decoder blocks, neighbor encoder and final norm, without the output embeddings."""

    def __init__(self, config: RetroConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(_decoder_block(config, i + 1) for i in range(config.num_hidden_layers))
        self.norm = FinalNorm(config.hidden_size, eps=config.rms_norm_eps)
        if config.cca_layers:
            self.encoder = _neighbor_encoder(config)
            self.encoder_embedding = _encoder_embedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Int[Tensor, "b n"] | None = None,
        neighbor_ids: Int[Tensor, "b l k r"] | None = None,
        neighbor_mask: Bool[Tensor, "b l k r"] | None = None,
        attention_mask: Shaped[Tensor, "..."] | None = None,
        document_ids: Int[Tensor, "b n"] | None = None,
        inputs_embeds: Float[Tensor, "b n d"] | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        past_key_values: RetroCache | None = None,
        use_cache: bool | None = None,
    ) -> BaseModelOutputWithPast:
        """Final hidden states, where each row has its tokens; see RetroForCausalLM.forward for the arguments."""
        if output_attentions:
            raise ValueError(f"output_attentions is {output_attentions}, which RETRO does not give; leave it out.")
        past_key_values = cache_for(past_key_values, use_cache, document_ids, self.config.chunk_len)
        check_text(input_ids, inputs_embeds)
        if neighbor_ids is None and neighbor_mask is not None:
            raise ValueError("neighbor_mask is given without neighbor_ids.")
        if neighbor_ids is not None and not self.config.cca_layers:
            raise ValueError("neighbor_ids is given, but this model has no CCA layers (config.cca_layers is empty).")
        rows = Alignment(attention_mask, has_cache=past_key_values is not None)
        input_ids, inputs_embeds, document_ids, attention_mask = rows.left(
            input_ids, inputs_embeds, document_ids, attention_mask
        )
        h = self._scaled(self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds)
        if past_key_values is not None:
            step = past_key_values.begin(*h.shape[:2], attention_mask)
            past_key_values.set_neighbors(step, neighbor_ids, neighbor_mask, h.device)
            past = self._past_key_values(h, past_key_values, step)
            states = self._forward_cached(h, past_key_values, step, past)
            past_key_values.end(step, input_ids)
        else:
            states = self._forward_whole(h, neighbor_ids, neighbor_mask, attention_mask, document_ids)
        states[-1] = self.norm(states[-1])
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return BaseModelOutputWithPast(
            last_hidden_state=rows.right(states[-1]),
            past_key_values=past_key_values,
            hidden_states=tuple(map(rows.right, states)) if wanted else None,
        )

    def _forward_whole(
        self, h, neighbor_ids, neighbor_mask, attention_mask, document_ids
    ) -> list[Float[Tensor, "b n d"]]:
        """The embeddings and every layer's output, over whole sequences."""
        chunks, encoded, states = None, None, [h]
        if neighbor_ids is not None:
            given = neighbor_ids, neighbor_mask, *h.shape[:2], self.config.chunk_len
            neighbor_ids, neighbor_mask = checked_neighbors(*given)
        if neighbor_ids is not None and neighbor_ids.numel():  # else n < m or r = 0: identity everywhere
            chunks = read_chunks(neighbor_mask, self.config.chunk_len, document_ids)
        inside = (*self._inside_documents(h, document_ids), self._rotary_table(h))
        for number, layer in enumerate(self.layers, start=1):
            h = self._run(layer, "attend", h, *inside)
            if chunks is not None and number in self.config.cca_layers:
                if encoded is None:
                    encoded = self._encode(h, neighbor_ids, chunks, attention_mask)
                h = self._run(layer, "read", h, encoded, chunks)
            h = self._run(layer, "feed", h)
            states.append(h)
        return states

    def _inside_documents(
        self, h: Float[Tensor, "b n d"], document_ids: Int[Tensor, "b n"] | None
    ) -> tuple[Bool[Tensor, "b n n"] | tuple[QueryBlock, ...] | None, tuple[int, ...] | None]:
        """How self-attention stays inside documents: by a mask or by their lengths; neither, if rows are whole.

        Lengths leave out what a mask computes and throws away; they take a call of the kernel for each document, which
        only on CPUs is cheap. Padding needs no mask: rows are right-padded here, so no real token could see padding
        before it.
        """
        is_relative = self.config.position == "relative"
        if uses_flex(h, self.config.head_dim) and (is_relative or document_ids is not None):
            return query_blocks(h, document_ids, RELATIVE_QUERIES if is_relative else h.shape[1]), None
        if document_ids is None:
            return None, None
        if has_fixed_shapes(document_ids):
            return (document_ids[:, :, None] == document_ids[:, None, :]).tril(), None
        is_first = F.pad(document_ids[:, 1:] != document_ids[:, :-1], (1, 0), value=True).flatten()
        lengths = F.pad(is_first.nonzero()[:, 0], (0, 1), value=is_first.numel()).diff().tolist()
        return None, tuple(lengths) if len(lengths) > len(document_ids) else None

    def _rotary_table(self, h: Float[Tensor, "b n d"]) -> tuple[Tensor, Tensor] | None:
        """The table of rotary positions that all layers share."""
        if self.config.position != "rotary":
            return None
        return rotary_table(torch.arange(h.shape[1], device=h.device), self.config.head_dim, self.config.rope_theta)

    def forward_fixed(self, input_ids: Int[Tensor, "b 1"], step: FixedStep) -> list[Float[Tensor, "b 1 d"]]:
        """The embeddings and every layer's output of one token of each row, the last one normalised."""
        cache = step.cache
        if step.found:
            cache.hold("mask", step.neighbor_mask, step)
        past = cache.past_key_values(self.config.head_dim, self.config.rope_theta)
        states = self._forward_cached(self._scaled(self.embed_tokens(input_ids)), cache, step, past)
        cache.end(input_ids)
        step.encoded = None  # else a graph would give it back
        states[-1] = self.norm(states[-1])
        return states

    def _forward_cached(
        self, h, cache: RetroCache | FixedRows, step: CachedStep | FixedStep, past: PastKeyValues
    ) -> list[Float[Tensor, "b s d"]]:
        """The same for new tokens, after those that the cache has seen.

        E_u needs H_u of all of C_u: at a chunk's last token the stack runs to ATTN of the first layer of P, then the
        neighbors are encoded, then CCA reads them.
        """
        states = [h]
        for number, layer in enumerate(self.layers, start=1):
            h = layer("extend", h, past, number - 1)
            if number in self.config.cca_layers:
                if number == self.config.cca_layers[0]:
                    conditions = cache.conditions(h, step)
                    if step.found:
                        ids, mask = step.neighbor_ids[:, None], step.neighbor_mask[:, None]
                        step.encoded = self.encoder(self._embedded(ids), mask, conditions[:, None])[:, 0]
                if step.reads:
                    h = layer("read_held", h, partial(cache.read, f"cca.{number}", step))
            h = layer("feed", h)
            states.append(h)
        return states

    def _past_key_values(self, h, cache: RetroCache, step: CachedStep) -> PastKeyValues:
        """What self-attention needs of the tokens before; columns are positions, since only distances count."""
        if cache.attention is None:
            cache.attention = Cache(layer_class_to_replicate=GrowingLayer)
        s, start, padding = step.length, cache.length, cache.padding
        columns, _ = cache.get_mask_sizes(s, 0)
        positions = torch.arange(start, start + s, device=h.device)
        prefix = cache.prefix
        plain = columns == start + s and not any(padding)
        mask = None
        if not (plain and (start == 0 or s == 1)):
            keys = torch.arange(columns, device=h.device)
            mask = (keys <= positions[:, None])[None]
            if any(padding):
                is_text = keys >= prefix + on_device(padding, h.device)[:, None]
                mask = mask & (is_text | (keys < prefix))[:, None]
        rotary = cache.rotary_table(start, start + s, self.config.head_dim, self.config.rope_theta, h.device)
        return PastKeyValues(cache.update, positions, rotary, attendable(mask), mask is None and s > 1, cache.tables)

    def _encode(self, h, neighbor_ids, chunks: ReadChunks, attention_mask) -> Float[Tensor, "c k r e"]:
        """E_u of the chunks that are read, from the activations at the first layer of P."""
        m = self.config.chunk_len
        embedded, conditions = self._embedded(chunks.pack(neighbor_ids)[None]), chunks.pack(chunks_of(h, m))[None]
        mask = None if chunks.mask is None else chunks.mask[None]
        condition_mask = None
        if attention_mask is not None:
            condition_mask = chunks.pack(chunks_of(attention_mask.bool()[..., None], m)[..., 0])[None]
        return self._run(self.encoder, embedded, mask, conditions, condition_mask)[0]

    def _embedded(self, neighbor_ids: Int[Tensor, "b l k r"]) -> Float[Tensor, "b l k r c"]:
        if not self.config.encoder_shares_embeddings:
            return self._scaled(self.encoder_embedding(neighbor_ids))
        embedded = self._scaled(self.embed_tokens(neighbor_ids))
        return embedded if self.encoder_embedding is None else self.encoder_embedding(embedded)

    def _scaled(self, embedded: Float[Tensor, "*s d"]) -> Float[Tensor, "*s d"]:
        """Embeddings as decoder and encoder read them."""
        multiplier = self.config.embedding_multiplier
        return embedded if multiplier == 1 else embedded * multiplier

    def _run(self, function, *args):
        if self.gradient_checkpointing and self.training:
            return self._gradient_checkpointing_func(function, *args)
        return function(*args)


class RetroForCausalLM(RetrievalGeneration, RetroPreTrainedModel, GenerationMixin):
    """RETRO with output embeddings: what one trains, saves, loads and samples from.

    Source: Borgeaud et al. 2022, sections 2.4-2.5.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    accepts_loss_kwargs = True  # a Trainer gives num_items_in_batch

    def __init__(self, config: RetroConfig):
        super().__init__(config)
        self.model = RetroModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Int[Tensor, "b n"] | None = None,
        neighbor_ids: Int[Tensor, "b l k r"] | None = None,
        neighbor_mask: Bool[Tensor, "b l k r"] | None = None,
        labels: Int[Tensor, "b n"] | None = None,
        attention_mask: Shaped[Tensor, "..."] | None = None,
        document_ids: Int[Tensor, "b n"] | None = None,
        inputs_embeds: Float[Tensor, "b n d"] | None = None,
        return_logits: bool | None = None,
        logits_to_keep: int | Int[Tensor, " p"] = 0,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        fixed: FixedStep | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Logits and, with labels, the mean loss in nats.

        Args:
            input_ids: Tokens. Rows may be padded left or right where `attention_mask` says so; chunks are counted
                from each row's first real token.
            neighbor_ids: Tokens of the k neighbors [N, F] of each whole chunk, l = n // chunk_len; None is RETRO[OFF].
            neighbor_mask: True = a real token; a neighbor with no True is missing. Default: all real.
            labels: As in Hugging Face: shifted inside, -100 ignored.
            attention_mask: 1 = a real token.
            document_ids: For packed documents, each in one run: tokens attend inside their document only, and a token
                reads E_u only if all of C_u is in its document.
            inputs_embeds: Embeddings in place of `input_ids`.
            return_logits: Default: unless training with labels. Without logits the loss is computed in slices.
            logits_to_keep: Logits of the last positions only, or of those a tensor names; 0 = all.
            output_hidden_states: Whether to give the embeddings and every layer's output, the last one normalised.
            output_attentions: None or False, as PEFT and trainers pass it.
            past_key_values: What `use_cache` gave for the tokens before these. `attention_mask` is then for all tokens
                so far, padded on the left only; `neighbor_ids` holds, for each row, the neighbors of the chunks that
                these tokens complete (None: they have none), and k may change from step to step. Keys and values in a
                cache of another kind come before each text and are not counted, as in prefix tuning.
            use_cache: Whether to give `past_key_values`. Default: if some are given.
            num_items_in_batch: Labels over which the mean is taken, where these rows are a part of a batch; as a
                Trainer counts them, over all micro-batches and processes of an update. Default: those of these rows.
            fixed: From generate() with a static cache: what goes with `input_ids`, in place of all else.
            kwargs: Nothing but shift_labels [b, n], in place of labels: of each position the token after it, as
                sequence parallelism gives them. A Trainer would take it for a label that it must have if it were named.

        Raises ValueError for what does not fit together, and for `document_ids` beside a cache.
        """
        if fixed is not None:
            states = self.model.forward_fixed(input_ids, fixed)
            logits = self.lm_head(states[-1])
            return CausalLMOutputWithPast(logits=logits, hidden_states=tuple(states) if output_hidden_states else None)
        shift_labels = kwargs.pop("shift_labels", None)
        for name in kwargs:
            raise ValueError(unknown_name(name, inspect.signature(self.forward).parameters, "argument of forward"))
        check_text(input_ids, inputs_embeds, labels=labels, shift_labels=shift_labels)
        tokens = {"input_ids": input_ids, "neighbor_ids": neighbor_ids, "labels": labels, "shift_labels": shift_labels}
        check_tokens(self.config.vocab_size, neighbor_mask, **tokens)
        cache = cache_for(past_key_values, use_cache, document_ids, self.config.chunk_len)
        if cache is not None and self.model.gradient_checkpointing and self.training and torch.is_grad_enabled():
            raise ValueError("use_cache is true with gradient checkpointing, which a cached run has not; leave it out.")
        rows = Alignment(attention_mask, has_cache=cache is not None)
        input_ids, inputs_embeds, labels, shift_labels, document_ids, attention_mask = rows.left(
            input_ids, inputs_embeds, labels, shift_labels, document_ids, attention_mask
        )
        targets = targets_of(labels, shift_labels)
        return_logits = (targets is None or not self.training) if return_logits is None else return_logits
        with_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        only_loss = targets is not None and cache is None and not (return_logits or with_states)
        if only_loss and neighbor_ids is not None:
            neighbor_ids, neighbor_mask = self._that_matter(neighbor_ids, neighbor_mask, targets, document_ids)
        given = input_ids, neighbor_ids, neighbor_mask, attention_mask, document_ids, inputs_embeds
        outputs = self.model(*given, with_states, output_attentions, cache, return_dict=True)
        hidden, states = outputs.last_hidden_state, outputs.hidden_states
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return CausalLMOutputWithPast(
            loss=None if targets is None else of_items(self._loss(hidden, targets), targets, num_items_in_batch),
            logits=self.lm_head(rows.right(hidden)[:, kept]) if return_logits else None,
            past_key_values=cache,
            hidden_states=None if states is None else tuple(map(rows.right, states)),
        )

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, generation_mode, *args, **kwargs) -> None:
        """As Hugging Face's, put into a RetroCache."""
        refuse_assisted(generation_mode, model_kwargs)
        given = model_kwargs.get("past_key_values")
        if given is not None:
            model_kwargs["past_key_values"] = retro_cache(given, self.config.chunk_len)
        super()._prepare_cache_for_generation(generation_config, model_kwargs, generation_mode, *args, **kwargs)
        cache = model_kwargs.get("past_key_values")
        if given is None and cache is not None:
            grows = type(cache) is DynamicCache and not cache.offloading
            model_kwargs["past_key_values"] = RetroCache(self.config.chunk_len, None if grows else cache)

    def _plan(self, cache: RetroCache, step: CachedStep, **neighbors: Tensor) -> FixedStep | None:
        """Tables of relative positions are made long enough before, since in a graph nothing grows."""
        if cache.is_compileable and self.config.position == "relative":
            for layer in self.model.layers:
                layer.attention.relative.table(range(cache.attention.get_max_length()), cache.tables)
        return super()._plan(cache, step, **neighbors)

    def _that_matter(
        self, neighbor_ids, neighbor_mask, targets, document_ids
    ) -> tuple[Int[Tensor, "b l k r"], Bool[Tensor, "b l k r"]]:
        """Neighbors and their mask, without the neighbors of chunks that no position with a target can see.

        E_u reaches the tokens of C_u's document from the last of C_u on.
        """
        m, (b, n) = self.config.chunk_len, targets.shape
        neighbor_ids, neighbor_mask = checked_neighbors(neighbor_ids, neighbor_mask, b, n, m)
        predicting = (targets >= 0).to(neighbor_mask.device)
        first_reader = torch.arange(1, n // m + 1, device=targets.device)[:, None] * m - 1
        sees = predicting[:, None] & (torch.arange(n, device=targets.device) >= first_reader)  # [b, l, n]
        if document_ids is not None:
            sees = sees & (document_ids[:, None] == document_ids[:, : n // m * m : m, None])
        return neighbor_ids, neighbor_mask & sees.any(-1)[..., None, None]

    def _loss(self, hidden: Float[Tensor, "b n d"], targets: Int[Tensor, "b n"]) -> Float[Tensor, ""]:
        targets = targets.to(hidden.device).flatten()
        return linear_cross_entropy(hidden.flatten(0, 1), self.lm_head.weight, targets)


def _decoder_block(config: RetroConfig, number: int) -> DecoderBlock:
    attention = dict(
        num_heads=config.num_attention_heads,
        head_dim=config.head_dim,
        num_key_value_heads=config.num_key_value_heads,
        position=config.position,
        rope_theta=config.rope_theta,
    )
    cross = dict(
        context_dim=config.encoder_hidden_size,
        chunk_len=config.chunk_len,
        smeared_keys=config.smeared_keys,
        partial_rotary_factor=config.cca_partial_rotary_factor,
        **attention,
    )
    feed_forward = dict(activation=config.hidden_act, gated=config.gated_feed_forward)
    return DecoderBlock(
        config.hidden_size,
        config.intermediate_size,
        attention,
        feed_forward,
        cross if number in config.cca_layers else None,
        config.rms_norm_eps,
    )


def _neighbor_encoder(config: RetroConfig) -> NeighborEncoder:
    return NeighborEncoder(
        dim=config.encoder_hidden_size,
        inner_dim=config.encoder_intermediate_size,
        num_layers=config.encoder_num_layers,
        condition_dim=config.hidden_size,
        cross_attention_layers=config.encoder_cross_attention_layers,
        attention=dict(
            num_heads=config.encoder_num_attention_heads,
            head_dim=config.encoder_head_dim,
            position=config.position,
            rope_theta=config.rope_theta,
        ),
        feed_forward=dict(activation=config.hidden_act, gated=config.gated_feed_forward),
        norm_eps=config.rms_norm_eps,
    )


def _encoder_embedding(config: RetroConfig) -> nn.Module | None:
    """From token ids, or with shared embeddings from those, to the encoder's width."""
    if not config.encoder_shares_embeddings:
        return nn.Embedding(config.vocab_size, config.encoder_hidden_size)
    if config.encoder_hidden_size == config.hidden_size:
        return None
    return nn.Linear(config.hidden_size, config.encoder_hidden_size, bias=False)
