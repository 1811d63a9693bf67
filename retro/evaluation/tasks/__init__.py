"""Tasks with one right answer: last words, summaries, questions. Names load on demand."""

from retro.common.lazy import on_demand

_HOME = {
    "measure_lambada": "retro.evaluation.tasks.lambada",
    "exact_match": "retro.evaluation.tasks.metrics",
    "f1": "retro.evaluation.tasks.metrics",
    "normalize_answer": "retro.evaluation.tasks.metrics",
    "Passage": "retro.evaluation.tasks.passages",
    "Question": "retro.evaluation.tasks.passages",
    "find_passages": "retro.evaluation.tasks.passages",
    "read_questions": "retro.evaluation.tasks.passages",
    "recall": "retro.evaluation.tasks.passages",
    "without_overlap": "retro.evaluation.tasks.passages",
    "measure_answers": "retro.evaluation.tasks.question_answering",
    "Reader": "retro.evaluation.tasks.reading",
    "open_reader": "retro.evaluation.tasks.reading",
    "read_summaries": "retro.evaluation.tasks.summaries",
    "measure_summaries": "retro.evaluation.tasks.summaries",
}
__all__ = list(_HOME)
__getattr__, __dir__ = on_demand(__name__, _HOME)
