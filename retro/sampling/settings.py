"""How the tokens of a text are chosen."""

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
        stop_strings: Strings that end a text. Default: none.

    Raises ValueError for what generate() would ignore or fail at.
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
    stop_strings: list[str] | None = None

    def __post_init__(self) -> None:
        for name in (
            "max_new_tokens",
            "temperature",
            "top_p",
            "num_beams",
            "num_return_sequences",
            "repetition_penalty",
        ):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"{name} is {value}; give a number above 0")
        if self.top_p is not None and self.top_p > 1:
            raise ValueError(f"top_p is {self.top_p}; give a probability, at most 1")
        if not 0 <= (self.seed or 0) < 2**63:
            raise ValueError(f"seed is {self.seed}; give a whole number from 0 to below 2^63")
        if self.do_sample:
            return
        for name in ("temperature", "top_p", "top_k", "seed"):
            if getattr(self, name) is not None:
                raise ValueError(f"{name} needs do_sample; give that too, or leave {name} out")
        if (self.num_return_sequences or 1) > (self.num_beams or 1):
            raise ValueError("num_return_sequences needs do_sample, or as many num_beams; give one of them")
