"""A SentencePiece tokenizer trained on a corpus, saved as a folder that Hugging Face loads as a fast tokenizer.

Byte-pair encoding with byte fallback and no normalization: decoding gives back the text, its line ends, tabs and
runs of spaces included. The trained model is translated once into a `tokenizers` model, which keeps exact offsets
into the text.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from retro.common.files import folder_written_aside, load_json
from retro.common.pretrained import first_line, own_code
from retro.common.values import check_record
from retro.text.corpus import read_documents
from retro.text.documents import Document
from retro.text.hugging_face import is_dataset

UNK, BOS, EOS, PAD = "<unk>", "<s>", "</s>", "<pad>"
_SPACE = "\u2581"  # how SentencePiece writes a space
_LINE_ENDS = ["\n", "\n\n", "\t"]  # SentencePiece would cut its sentences here, so they are pieces from the start
_SEGMENT_CHARS = 1000


def train_tokenizer(
    out: str | Path,
    inputs: str | Sequence[str] | Iterable[Document],
    vocab_size: int = 32_000,
    text_field: str = "text",
) -> Any:
    """Train a tokenizer on documents, save it in the folder `out` and return it.

    Arguments:
        out: a folder that does not exist or is empty.
        inputs: as for `retro.text.corpus.read_documents`, or documents.
        vocab_size: pieces, with 256 bytes, 4 special tokens (unk, bos, eos, pad) and 3 line ends among them.

    It puts bos before a text. Raises ValueError if the folder is in use, there is no text, or too little for the
    vocabulary.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is in use; choose another path for the tokenizer")
    if isinstance(inputs, (str, os.PathLike)) or is_dataset(inputs):
        inputs = [inputs]
    inputs = list(inputs)
    documents = inputs if inputs and isinstance(inputs[0], Document) else read_documents(inputs, text_field=text_field)
    tokenizer = _hugging_face(_train(_segments(documents), vocab_size))
    with folder_written_aside(out) as aside:
        tokenizer.save_pretrained(aside)
    return tokenizer


def open_tokenizer(folder: str | Path) -> Any:
    """The Hugging Face tokenizer saved in a folder; one without code of its own is opened without importing torch."""
    file = Path(folder) / "tokenizer_config.json"
    kind = check_record(file, load_json(file), {}).get("tokenizer_class") if file.is_file() else None
    try:
        if kind in ("TokenizersBackend", "PreTrainedTokenizerFast") and (file.parent / "tokenizer.json").is_file():
            from transformers import PreTrainedTokenizerFast

            return PreTrainedTokenizerFast.from_pretrained(folder)
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # tokenizers raises no other
        said = own_code(folder) or f"the tokenizer in {folder} cannot be loaded ({first_line(error)})"
        raise ValueError(f"{said}; restore it from a copy") from None


def _segments(documents: Iterable[Any]) -> Iterator[str]:
    """Runs of whole lines, at most some 1000 characters (SentencePiece leaves out what is longer than 4192 bytes)."""
    for document in documents:
        for line in document.text.split("\n"):
            for start in range(0, len(line), _SEGMENT_CHARS):
                yield line[start : start + _SEGMENT_CHARS]


def _train(segments: Iterator[str], vocab_size: int) -> list[str]:
    """The pieces of a SentencePiece BPE model, by id."""
    import sentencepiece as spm

    first = next(segments, None)
    if first is None:
        raise ValueError("the inputs hold no text to train a tokenizer on; give at least one document")
    model, failed = io.BytesIO(), []

    def watched() -> Iterator[str]:
        yield first
        try:
            yield from segments
        except Exception as error:  # SentencePiece would raise another one in its place
            failed.append(error)
            raise

    try:
        spm.SentencePieceTrainer.train(
            sentence_iterator=watched(),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            character_coverage=0.9999,
            user_defined_symbols=_LINE_ENDS,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            unk_piece=UNK,
            bos_piece=BOS,
            eos_piece=EOS,
            pad_piece=PAD,
            max_sentence_length=8 * _SEGMENT_CHARS,
            num_threads=1,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        if failed:
            raise failed[0] from None
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(f"vocab_size {vocab_size} does not suit the text ({reason}); try another one") from None
    processor = spm.SentencePieceProcessor(model_proto=model.getvalue())
    return [processor.id_to_piece(i) for i in range(processor.get_piece_size())]


def _hugging_face(pieces: list[str]) -> Any:
    """The same byte-pair model as a fast tokenizer; spaces stand for themselves, so the text needs no normalization."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, processors
    from transformers import PreTrainedTokenizerFast

    written = [piece.replace(_SPACE, " ") for piece in pieces]
    vocabulary = {piece: i for i, piece in enumerate(written)}
    backend = Tokenizer(
        models.BPE(vocab=vocabulary, merges=_merges(vocabulary), unk_token=UNK, byte_fallback=True, fuse_unk=False)
    )
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (UNK, BOS, EOS, PAD)])
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, vocabulary[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token=UNK,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        padding_side="right",
    )


def _merges(vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to put a piece together from two others, in the order in which SentencePiece would merge (by id)."""
    merges = []
    for piece, _ in sorted(vocabulary.items(), key=lambda item: item[1]):
        if piece in (UNK, BOS, EOS, PAD) or (len(piece) == 6 and piece.startswith("<0x")):
            continue
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocabulary and right in vocabulary:
                merges.append((left, right))
    return merges
