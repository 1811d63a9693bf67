"""generate() of a fit: the base's own without neighbors, with them the base's steps and the neighbors of each chunk."""

from __future__ import annotations

import inspect
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from retro.model import RetroCache
from retro.model.cache import retro_cache
from retro.model.fixed import FixedStep
from retro.model.generation import OPTIONS, RetrievalGeneration, refuse_assisted
from retro.model.padding import check_prompts
from retro.model.step import CachedStep, on_device
from retro.retrofit.caching import positions_of
from retro.retrofit.hooks import active


class RetrofitGeneration(RetrievalGeneration):
    """Mixed into a causal LM that has a `base` and takes neighbor_ids, neighbor_mask and a RetroCache."""

    def generate(self, inputs: Any = None, *args, **kwargs):
        """Hugging Face's generate(), with retrieval at the end of every chunk; without neighbors the base's own.

        Args: see RetrievalGeneration.generate.
        """
        if self._drops_caches:
            kwargs.setdefault("use_cache", False)
        own = {name: kwargs.pop(name, default) for name, default in OPTIONS.items()}
        asked = any(type(own[name]) is not type(default) or own[name] != default for name, default in OPTIONS.items())
        if asked or isinstance(kwargs.get("past_key_values"), RetroCache) or self._has_prompt_of_its_own():
            return super().generate(inputs, *args, **own, **kwargs)
        check_prompts(inputs, kwargs)
        return self.base.generate(inputs, *args, **kwargs)

    def generate_batch(self, *args, **kwargs):
        """The base's continuous batching; ValueError for neighbors, which it does not keep."""
        if kwargs.keys() & {*OPTIONS, "retrieval"}:
            self.init_continuous_batching()
        return self.base.generate_batch(*args, **kwargs)

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        """As Hugging Face's: what the base takes is used."""
        of_base = inspect.signature(self.base.forward).parameters
        super()._validate_model_kwargs({name: x for name, x in model_kwargs.items() if name not in of_base})

    def _has_prompt_of_its_own(self) -> bool:
        """Whether PEFT puts virtual tokens before each text (prompt and prefix tuning), which the base knows not of."""
        owner = getattr(vars(self).get("prepare_inputs_for_generation"), "__self__", None)
        return getattr(getattr(owner, "active_peft_config", None), "is_prompt_learning", False)

    def prepare_inputs_for_generation(
        self,
        input_ids: Int[Tensor, "b n"],
        next_sequence_length: int | None = None,
        past_key_values: RetroCache | None = None,
        attention_mask: Int[Tensor, "b columns"] | None = None,
        retrieval: Any = None,
        is_first_iteration: bool = False,
        inputs_embeds: Float[Tensor, "b n d"] | None = None,
        tokenizer: Any = None,
        **kwargs,
    ) -> dict[str, Any]:
        """As the base's, with the neighbors of the chunks that the new tokens complete."""
        reads = isinstance(past_key_values, RetroCache)
        if inputs_embeds is not None:
            kwargs["inputs_embeds"] = inputs_embeds
        if past_key_values is None:
            inputs = {"input_ids": input_ids, "attention_mask": attention_mask, **kwargs}
        else:
            inputs = self.base.prepare_inputs_for_generation(
                input_ids,
                next_sequence_length=next_sequence_length,
                past_key_values=past_key_values.attention if reads else past_key_values,
                attention_mask=attention_mask,
                is_first_iteration=is_first_iteration,
                **kwargs,
            )
            for name in ("next_sequence_length", "is_first_iteration"):  # some bases hand on all that they are given
                inputs.pop(name, None)
            inputs["past_key_values"] = past_key_values
        if not reads and retrieval is None:
            return inputs
        new = inputs.get("inputs_embeds") if inputs["input_ids"] is None else inputs["input_ids"]
        inputs |= self._neighbors_of_step(retrieval, new, attention_mask, past_key_values, is_first_iteration)
        if "fixed" in inputs and inputs.get("position_ids") is None:
            inputs |= positions_of(self.base, inputs["fixed"].cache.padding, past_key_values.length - 1, 1)
        return inputs

    def _plan(self, cache: RetroCache, step: CachedStep, **neighbors: Tensor) -> FixedStep | None:
        """With what the base makes of new neighbors, which no graph needs to hold: it depends on nothing else."""
        fixed = super()._plan(cache, step, **neighbors)
        if fixed is not None and fixed.found and self.config.matches:
            rows = on_device([chunk.row for chunk in step.found], fixed.neighbor_ids.device)
            ids, mask = (x[rows].flatten(0, 1) for x in (fixed.neighbor_ids, fixed.neighbor_mask))
            read = self.hidden_after(ids, mask, self.config.key_layer).unflatten(0, (len(rows), -1))
            every = read.new_zeros(len(fixed.neighbor_ids), *read.shape[1:])
            fixed.features = every.index_copy_(0, rows.to(read.device), read)
        return fixed

    def _forward_fixed(self, inputs: dict[str, Any], step: FixedStep) -> CausalLMOutputWithPast:
        """One token of each row, in tensors that keep their places: see retro.model.fixed."""
        cache = step.cache
        if step.found:
            cache.hold("mask", step.neighbor_mask, step)
        context = self._new_context(cache=cache, step=step)
        if step.features is not None:
            context.state["features"] = step.features
        with active(context):
            outputs = self.base(**inputs, past_key_values=cache.attention, use_cache=True, return_dict=True)
        mixture = self._mixture(context)
        logits = outputs.logits if mixture is None else mixture.edit(outputs.logits)
        cache.end(inputs["input_ids"])
        step.encoded = None  # else a graph would give it back
        states, attentions = outputs.get("hidden_states"), outputs.get("attentions")
        return CausalLMOutputWithPast(logits=logits, hidden_states=states, attentions=attentions)

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, generation_mode, *args, **kwargs) -> None:
        """The base's own, put into a RetroCache."""
        refuse_assisted(generation_mode, model_kwargs)
        given = model_kwargs.get("past_key_values")
        reads = model_kwargs.get("retrieval") is not None or isinstance(given, RetroCache)
        if given is not None and reads:
            model_kwargs["past_key_values"] = retro_cache(given, self.config.chunk_len, with_prefix=False)
        self.base._prepare_cache_for_generation(generation_config, model_kwargs, generation_mode, *args, **kwargs)
        if given is not None or generation_config.use_cache is False or not reads:
            return
        if model_kwargs.get("past_key_values") is None:
            raise ValueError(
                f"{type(self.base).__name__} keeps no cache that neighbors can go with; generate with use_cache=False."
            )
        model_kwargs["past_key_values"] = RetroCache(self.config.chunk_len, model_kwargs["past_key_values"])

    def _supports_logits_to_keep(self) -> bool:
        return self.base._supports_logits_to_keep()
