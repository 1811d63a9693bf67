"""How a question and its answer stand before a model, in tokens.

    text    "question: {question} \\n answer:", then " {answer}" and eos. Source: RETRO, section 4.3
    chat    where the tokenizer has a chat template: a turn of the user, and one of the assistant up to its end

Passages in the prompt stand in front of the question, the best one last (as Shao et al. 2024).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int64

from retro.evaluation.tasks.examples import encode
from retro.evaluation.tasks.passages import Passage

PROMPT = "question: {question} \n answer:"
CHAT_PROMPT = "Answer with a few words, without a sentence.\n\n{question}"


def is_chat(tokenizer: Any) -> bool:
    """Whether questions are put as turns of a chat."""
    return bool(getattr(tokenizer, "chat_template", None))


def prompt_of(tokenizer: Any) -> str:
    """The prompt that is taken where none is given."""
    return CHAT_PROMPT if is_chat(tokenizer) else PROMPT


def in_context(prompt: str, passages: Sequence[Passage]) -> str:
    """The passages in front of a prompt, the best one last, so that a cut at the start takes the worst."""
    texts = [f"{passage.title}\n{passage.text}".strip() for passage in reversed(passages)]
    return "\n\n".join([*texts, prompt])


def prompt_ids(tokenizer: Any, prompt: str) -> Int64[np.ndarray, " s"]:
    """The ids of a prompt, after which the answer begins."""
    if not is_chat(tokenizer):
        return encode(tokenizer, prompt)
    return _chat(tokenizer, [{"role": "user", "content": prompt}], add_generation_prompt=True)


def answer_ids(tokenizer: Any, prompt: str, answer: str) -> Int64[np.ndarray, " t"]:
    """The ids of an answer after a prompt, with the token that ends it.

    Raises ValueError for a chat template whose turn of the assistant does not begin as its prompt for one says.
    """
    start = prompt_ids(tokenizer, prompt)
    if not is_chat(tokenizer):
        rest = encode(tokenizer, f"{prompt} {answer}")[len(start) :]
        return rest if tokenizer.eos_token_id is None else np.append(rest, tokenizer.eos_token_id)
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    whole = _chat(tokenizer, turns)
    if not np.array_equal(whole[: len(start)], start):
        raise ValueError(
            "the tokenizer's chat template begins the assistant's turn otherwise than add_generation_prompt does, so "
            "that no answer can be told from its prompt; mend the template, or set it to None."
        )
    rest = whole[len(start) :]
    ends = np.flatnonzero(np.isin(rest, tokenizer.all_special_ids))
    return rest[: ends[0] + 1] if len(ends) else rest


def _chat(tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> Int64[np.ndarray, " s"]:
    ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **options)
    return np.asarray(ids, np.int64)
