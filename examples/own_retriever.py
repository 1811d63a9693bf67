"""A retriever of your own: a trained model reads what your search finds, whatever that is.

    python examples/own_retriever.py MODEL TEXTS

MODEL is a trained RETRO or a fitted base, such as out/run of own_text.py. TEXTS is as there, here cut into paragraphs.

generate() takes any callable in the place of a Retriever: it is called with the tokens of the chunks that have just
been completed, [q, m], and num_neighbors = k, and gives `Neighbors`. `Neighbors.from_texts` makes them of the texts
that a search found.

It costs one search for every 64 tokens that are written; lookahead=16 in generate() hides a slow one behind the
writing.
What to change: `search`, which stands for a call of your search service: Elasticsearch, a vector database, the web.
"""

import math
import sys
from collections import Counter

import retro
from retro.sampling import terminal_text

PROMPT = "The datastore"


class ParagraphSearch:
    """Paragraphs by the rare words that they share with a query."""

    def __init__(self, documents):
        paragraphs = [
            (document, text) for document in documents for text in document.text.split("\n\n") if text.strip()
        ]
        self.texts = [text for _, text in paragraphs]
        self.sources = [retro.Source(d.id, d.title, d.source, number) for number, (d, _) in enumerate(paragraphs)]
        self.words = [set(text.lower().split()) for text in self.texts]
        seen = Counter(word for words in self.words for word in words)
        self.weight = {word: math.log(len(self.words) / count) for word, count in seen.items()}

    def search(self, text: str, k: int) -> list[tuple[float, int]]:
        """Scores and numbers of the k best paragraphs, best first."""
        asked = set(text.lower().split())
        scores = [sum(self.weight[word] for word in asked & words) for words in self.words]
        return sorted(((score, n) for n, score in enumerate(scores) if score > 0), reverse=True)[:k]


class OwnRetriever:
    """What generate() calls."""

    def __init__(self, paragraphs: ParagraphSearch, tokenizer, retrieved_len: int):
        self.paragraphs, self.tokenizer, self.retrieved_len = paragraphs, tokenizer, retrieved_len

    def __call__(self, queries, num_neighbors: int) -> retro.Neighbors:
        chunks = self.tokenizer.batch_decode(queries, skip_special_tokens=True)
        found = [self.paragraphs.search(chunk, num_neighbors) for chunk in chunks]
        return retro.Neighbors.from_texts(
            [[self.paragraphs.texts[n] for _, n in hits] for hits in found],
            self.tokenizer,
            num_neighbors,
            self.retrieved_len,
            scores=[[score for score, _ in hits] for hits in found],
            sources=[[self.paragraphs.sources[n] for _, n in hits] for hits in found],
        )


def main(model: str, texts: str) -> None:
    model, tokenizer, _ = retro.load(model)
    retriever = OwnRetriever(ParagraphSearch(retro.read_documents([texts])), tokenizer, model.config.retrieved_len)
    (text,) = retro.sample(model, tokenizer, [PROMPT], retriever)
    print(terminal_text(text))


if __name__ == "__main__":
    main(*sys.argv[1:]) if len(sys.argv) > 2 else print(__doc__)
