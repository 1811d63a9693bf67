"""Your own text to a RETRO: text becomes a datastore, a model is trained on it, and continues a text with its sources.

    python examples/own_text.py TEXTS OUTPUT [KEY=VALUE ...]
    python examples/own_text.py docs out max_tokens=100000   # the way in 40 s; good text takes more of both

TEXTS is a folder of .txt, .md, .rst, .jsonl or .parquet files, one such file, or package:NAME for the documentation of
an installed package. OUTPUT becomes tokenizer/, store/ and run/, which the other examples read.

It costs, on two CPU cores, about 25 s a megabyte of text for the datastore and 105 s for a million tokens of training.
What to change: VOCAB_SIZE (2048 suits 50 KB of text, 8192 some megabytes), RECIPE and KEY=VALUE for another model or
another training (`retro train --help` names the keys), PROMPT for another text. For a tokenizer that you have already,
give its Hugging Face name or folder to BuildSettings.
"""

import sys
from pathlib import Path

import retro
from retro.sampling import terminal_text
from retro.text.tokenizer import train_tokenizer
from retro.training import pretrain

VOCAB_SIZE = 2048
RECIPE = "train_small"
PROMPT = "The datastore"


def main(texts: str, output: str, *settings: str) -> None:
    tokenizer, store, run = (Path(output) / name for name in ("tokenizer", "store", "run"))

    # text -> chunks of 64 tokens, their keys, and the neighbors of each chunk in other documents
    train_tokenizer(tokenizer, texts, vocab_size=VOCAB_SIZE)
    built = retro.build_store(retro.BuildSettings(store, [texts], tokenizer), progress=True)
    retro.build_neighbors(built, k=2, progress=True)

    # the recipe, its settings replaced where KEY=VALUE says so; a run that was stopped goes on
    if not pretrain.main(RECIPE, [f"store={store}", f"output={run}", *settings]):
        raise SystemExit("stopped; the same command goes on from the last checkpoint")

    # every whole chunk of the text searches the datastore, and the next one reads what it found
    model, tokenizer, retriever = retro.load(run, store)
    (text,) = retro.sample(model, tokenizer, [PROMPT], retriever)
    print(terminal_text(text))


if __name__ == "__main__":
    main(*sys.argv[1:]) if len(sys.argv) > 2 else print(__doc__)
