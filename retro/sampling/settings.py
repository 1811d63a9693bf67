"""How text is written."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(kw_only=True)
class DecodingSettings:
    """How the next token is chosen; the names are those of Hugging Face's generate().

    Arguments:
        max_new_tokens: Tokens to write. Default: 128, or what the model has room for.
        do_sample: Draw the next token; without this it is the most likely one.
        temperature: Temperature of sampling. Default: 1.
        top_p: Draw from the likeliest tokens that together have this probability. Default: 1.
        top_k: Draw from so many likeliest tokens. Default: 50.
        seed: Seed of sampling. Default: 0.
        num_beams: Texts of a beam search. Default: no beam search.
        num_return_sequences: Texts for each prompt. Default: 1.
        repetition_penalty: A number above 1 makes tokens less likely that the text has already. Default: 1.
        stop: Strings that end a text. Default: none.
    """

    max_new_tokens: int | None = None
    do_sample: bool = False
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    num_beams: int | None = None
    num_return_sequences: int | None = None
    repetition_penalty: float | None = None
    stop: list[str] | None = None
