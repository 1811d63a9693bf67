"""How the tokens of a text are chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from retro.common.values import Count, CountOrZero, NumNeighbors, Positive, Range, check_fields


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
        stop_strings: Strings that end a text. Default: none.

    Raises ValueError for what generate() would ignore or fail at.
    """

    max_new_tokens: Count | None = None
    do_sample: bool = False
    temperature: Positive | None = None
    top_p: Annotated[float, Range(gt=0, le=1)] | None = None
    top_k: CountOrZero | None = None
    seed: CountOrZero | None = None
    num_beams: NumNeighbors | None = None
    num_return_sequences: NumNeighbors | None = None
    repetition_penalty: Positive | None = None
    stop_strings: list[str] | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.do_sample:
            return
        for name in ("temperature", "top_p", "top_k", "seed"):
            if getattr(self, name) is not None:
                raise ValueError(f"{name} needs do_sample; give that too, or leave {name} out")
        if (self.num_return_sequences or 1) > (self.num_beams or 1):
            raise ValueError("num_return_sequences needs do_sample, or as many num_beams; give one of them")
