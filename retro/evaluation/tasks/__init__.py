"""Tasks with one right answer: last words, summaries, questions. Names load on demand."""

from importlib import import_module

_HOME = {
    "lambada_table": "lambada",
    "measure_lambada": "lambada",
    "exact_match": "metrics",
    "f1": "metrics",
    "normalize_answer": "metrics",
    "Passage": "passages",
    "Question": "passages",
    "find_passages": "passages",
    "read_questions": "passages",
    "recall": "passages",
    "without_overlap": "passages",
    "answers_table": "question_answering",
    "measure_answers": "question_answering",
    "recall_table": "question_answering",
    "Reader": "reading",
    "open_reader": "reading",
    "read_summaries": "summaries",
    "measure_summaries": "summaries",
    "summaries_table": "summaries",
}
__all__ = list(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
