"""lm_eval's tasks on RETRO models and others, with a datastore. Needs `pip install retro-lm[eval]`.

    from retro.evaluation.harness import RetroLM
    lm = RetroLM("fitted", store="store")
    lm_eval.simple_evaluate(model=lm, tasks=["lambada_openai"], use_cache=lm.cache_file("cache"))

    retro task lm-eval fitted --store store --tasks lambada_openai
    python -m retro.evaluation.harness --model retro --model_args pretrained=fitted,store=store --tasks lambada_openai

The last is lm_eval's own command, to which importing this module has made the model "retro" known.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from retro.common.devices import find_device
from retro.common.files import stable_hash
from retro.evaluation.bits import neighbors_of
from retro.evaluation.scorer import reads_neighbors
from retro.evaluation.tasks.examples import Example, ScoredContinuation
from retro.evaluation.tasks.reading import Reader, open_reader
from retro.evaluation.tasks.results import about
from retro.retrieval.filters import shares_run
from retro.text.chunks import tokenizer_fingerprint
from retro.version import __version__

READING = ("neighbors", "prompt")
logger = logging.getLogger(__name__)
_AUTO_BATCH = 64
_WHAT_MADE_IT = "retro-lm"  # key of a response cache


@register_model("retro")
class RetroLM(TemplateLM):
    """A causal LM that reads from a datastore, as lm_eval wants one.

    The neighbors are those of the whole chunks of a context, the same for every continuation, which may go over chunk
    borders. Rolling log-likelihoods and generation search every whole chunk before the token at hand.

    Args:
        pretrained: Folder, Hugging Face name, GGUF file or package of a model, or a model in memory.
        store: Datastore; None is RETRO[OFF], or a plain LM.
        index: The kind of search; see `Retriever`.
        num_neighbors: k, default the model's; with reading="prompt" how many passages, default 3.
        reading: "neighbors", or "prompt" for any causal LM: the passages found for the last chunk of a context stand in
            front of it, the best one last, without those that share 13 words in a row with that chunk and the
            continuation (Shao et al. 2024, MassiveDS). What generation should give is not known here: only those that
            overlap with the chunk are left out.
        retrieval: "on", "off", or "random" (neighbors of log-likelihoods only); default "on" with a store.
        align: Where contexts stand in the chunks; see `retro.evaluation.tasks.reading`.
        tokenizer: Of a model in memory; default the store's.
        max_length: Tokens of an input; default the model's positions, else 2048.
        batch_size, device, dtype: As in lm_eval. "auto" takes as many texts as leave their logits room, at most
            `max_batch_size` of them.
        max_batch_size: For "auto"; default 64.
        seed: Of random neighbors.
        base: Of a RETRO-fitted model; see `retro.load`.
    """

    def __init__(
        self,
        pretrained: Any,
        store: Any = None,
        index: str = "auto",
        num_neighbors: int | None = None,
        reading: str = "neighbors",
        retrieval: str | None = None,
        align: str = "start",
        tokenizer: Any = None,
        max_length: int | None = None,
        batch_size: int | str = 8,
        max_batch_size: int | None = None,
        device: str | None = None,
        dtype: Any = None,
        seed: int = 0,
        base: Any = None,
    ):
        super().__init__()
        batch_size = _batch_size(batch_size, max_batch_size)
        if reading not in READING:
            raise ValueError(f"reading is {reading!r}; choose one of {', '.join(READING)}.")
        if reading == "prompt" and (store is None or align != "start" or retrieval is not None):
            raise ValueError(
                "reading is 'prompt'; it needs a store, and neither align nor retrieval means anything then."
            )
        if device is not None and device.startswith("cuda") and not torch.cuda.is_available():
            logger.warning("there is no CUDA here; the model stays where it is loaded")  # cuda is lm_eval's default
            device = None
        place = None if device is None else find_device(device)
        retrieval = "off" if reading == "prompt" else retrieval
        options = {} if retrieval is None else {"retrieval": retrieval}
        reader = open_reader(
            pretrained, store, index, tokenizer, dtype, align=align, batch_size=batch_size, cache=False, seed=seed,
            max_len=max_length, base=base, **options,
        )  # fmt: skip
        if place is not None:
            reader.model.to(place)
        longest = getattr(reader.model.config.get_text_config(), "max_position_embeddings", None) or 2048
        k = num_neighbors or (3 if reading == "prompt" else None)
        self.reader: Reader = replace(reader, max_len=max_length or longest, num_neighbors=k)
        self.reading, self.tokenizer, self._device = reading, reader.tokenizer, reader.model.device

    # What lm_eval asks of a model

    @property
    def eot_token_id(self) -> int:
        return self.reader.filler

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def max_length(self) -> int:
        return self.reader.longest

    @property
    def max_gen_toks(self) -> int:
        return min(256, self.max_length // 2)

    @property
    def batch_size(self) -> int:
        return self.reader.batch_size

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The chat as the tokenizer's template writes it."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        """As the tokenizer does it by itself, special tokens that a chat template wrote included."""
        bos = self.tokenizer.bos_token
        if add_special_tokens is None and bos is not None and string.startswith(bos):
            add_special_tokens = False
        given = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer.encode(string, **given)

    def _loglikelihood_tokens(self, requests: Sequence[tuple], disable_tqdm: bool = False, **kwargs) -> list[tuple]:
        """(log-probability, whether greedy decoding writes it) of each continuation; requests hold texts and tokens."""
        reader = replace(self.reader, progress=not disable_tqdm)
        examples = [self._example(reader, *request) for request in requests]
        answers = [(one.log_prob, one.right) for one in reader.score(examples)]
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def loglikelihood_rolling(self, requests: Sequence, disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts, in lm_eval's windows: disjoint, each after one token, of `max_length` tokens.

        The first token is bos, or eos where there is none; it is not scored. Chunks are counted from the start of each
        window.
        """
        examples, owners = [], []
        for owner, request in enumerate(requests):
            for context, predicted in self._windows(request.args[0]):
                examples.append(Example(context, predicted))
                owners.append(owner)
        reader, totals = replace(self.reader, progress=not disable_tqdm, align="start"), np.zeros(len(requests))
        scored: list[ScoredContinuation] = reader.score(examples, of="text")
        np.add.at(totals, owners, [one.log_prob for one in scored])
        for request, total in zip(requests, totals.tolist(), strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals.tolist()

    def generate_until(self, requests: Sequence, disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each context, as the task's generation_kwargs say."""
        written, groups = [""] * len(requests), {}
        for i, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(i)
        for group in groups.values():
            contexts, given = [requests[i].args[0] for i in group], requests[group[0]].args[1]
            for i, text in zip(group, self._generate(contexts, given, not disable_tqdm), strict=True):
                written[i] = text
                self.cache_hook.add_partial("generate_until", requests[i].args, text)
        return written

    def get_model_info(self) -> dict[str, Any]:
        """What results say of model and store."""
        return {"retro": self._identity | {"fingerprint": self.fingerprint}}

    # Inputs

    def _example(self, reader: Reader, texts: tuple[str, str], context: list[int], continuation: list[int]) -> Example:
        if self.reading == "prompt":
            context = self._with_passages(context, texts[1], reader.longest + 1 - len(continuation))
        ids = np.asarray(context, np.int64)
        return Example(reader.place(ids), np.asarray(continuation, np.int64))

    def _windows(self, text: str) -> list[tuple[np.ndarray, np.ndarray]]:
        tokens = self.tok_encode(text, add_special_tokens=False)
        windows = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1)
        return [tuple(np.asarray(part, np.int64) for part in make_disjoint_window(one)) for one in windows]

    def _generate(self, contexts: list[str], given: dict[str, Any], progress: bool) -> list[str]:
        options = normalize_gen_kwargs(given, self.max_gen_toks)
        stop = handle_stop_sequences(options.pop("until"), self.tokenizer.decode([self.eot_token_id]))
        room = options.pop("max_gen_toks")
        if not options["do_sample"]:
            options.pop("temperature", None)
        reader = replace(self.reader, progress=progress)
        prompts = [self.tok_encode(context) or [self.prefix_token_id] for context in contexts]
        if self.reading == "prompt":
            prompts = [self._with_passages(prompt, "", self.max_length - room) for prompt in prompts]
        placed = [reader.place(np.asarray(prompt, np.int64)) for prompt in prompts]
        written = reader.complete(placed, room, stop, **options)
        return [postprocess_generated_text(text, stop, None) for text in written]

    def _with_passages(self, context: list[int], continuation: str, room: int) -> list[int]:
        """The tokens of the passages and of the context behind them; passages that do not fit are left out whole."""
        k, retriever = self.reader.num_neighbors, self.reader.retriever
        query = self.tokenizer.decode(context[-self.reader.chunk_len :], skip_special_tokens=True)
        if not query.strip():
            return context
        rows = retriever([query], min(3 * k + 8, retriever.index.num_rows)).ids[0]
        passages = self.reader.passage_texts(rows[rows >= 0])
        clean = [passage for passage in passages if not shares_run(passage, query + continuation)][:k]
        head = self._num_special(context)
        for passage in clean:
            tokens = self.tokenizer.encode(f"{passage}\n\n", add_special_tokens=False)
            if len(tokens) + len(context) <= room:
                context = [*context[:head], *tokens, *context[head:]]
        return context

    def _num_special(self, context: list[int]) -> int:
        return int(context[0] == self.tokenizer.bos_token_id)

    # What its answers depend on

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the model's weights, the tokenizer, the store, and all that says how they are read."""
        weights = hashlib.sha256()
        for name, tensor in sorted(self.reader.model.state_dict().items()):
            held = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            weights.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode() + held.tobytes())
        tokenizer = tokenizer_fingerprint(self.tokenizer)
        return stable_hash(self._identity | {"weights": weights.hexdigest(), "tokenizer": tokenizer})

    @property
    def about(self) -> dict[str, Any]:
        """What a result says of model, store and code; "versions" are lm_eval's word for those of its tasks."""
        made_with = about(self.reader)
        return made_with | {"library_versions": made_with.pop("versions"), "reading": self.reading}

    @property
    def _identity(self) -> dict[str, Any]:
        reader, retriever = self.reader, self.reader.retriever
        reads = reads_neighbors(reader.model) and self.reading == "neighbors"
        return {
            "model": reader.model.config.to_dict().get("model_type"),
            "store": None if retriever is None else retriever.store.fingerprint,
            "index": None if retriever is None else retriever.index.kind,
            "num_neighbors": neighbors_of(reader.model, reader.num_neighbors) if reads else reader.num_neighbors,
            "reading": self.reading,
            "retrieval": reader.retrieval,
            "align": reader.align,
            "max_length": self.max_length,
            "seed": reader.seed,
            "library_version": __version__,
        }

    def cache_file(self, folder: str | Path) -> str:
        """For simple_evaluate's `use_cache`: a name in a folder that is another for other models and stores."""
        return str(Path(folder) / self.fingerprint[:16])

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Take lm_eval's response cache; ValueError if it holds the answers of another model or store.

        lm_eval's keys are the requests alone. Its file holds pickles: open your own ones only.
        """
        answers = cache_hook.dbdict
        if answers is not None:
            found = answers.get(_WHAT_MADE_IT)
            if found != self.fingerprint and len(answers):
                raise ValueError(
                    f"the response cache {answers.filename} holds the answers of another model or store; "
                    "give another file, as RetroLM.cache_file names one."
                )
            answers[_WHAT_MADE_IT] = self.fingerprint
        super().set_cache_hook(cache_hook)


def _batch_size(batch_size: int | str, most: int | None) -> int:
    """A number, or for "auto" the most: batches of the scorer are of as many texts as their logits leave room for."""
    if str(batch_size).partition(":")[0] == "auto":
        return _AUTO_BATCH if most is None else int(most)
    if not str(batch_size).isdigit() or int(batch_size) < 1 or most is not None:
        said = f"batch_size is {batch_size!r}, max_batch_size {most}"
        raise ValueError(f"{said}; give one number, or batch_size auto with or without a maximum.")
    return int(batch_size)


def run_tasks(
    lm: RetroLM,
    tasks: Sequence[str],
    include: str | Path | None = None,
    cache: str | Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Run tasks of lm_eval by name: its results, those of every document left out, and what they were measured with.

    Args:
        include: Folder with the YAML files of other tasks.
        cache: Folder where responses are kept, a file for each model and store.
        num_fewshot: Examples in the prompt; default the task's. `seed` draws them.
        limit: Read so many documents of each task.

    Raises ValueError for a task that is unknown.
    """
    import lm_eval
    from lm_eval.tasks import TaskManager

    own = {} if include is None else {"include_path": str(include)}
    manager = TaskManager(**own, include_defaults=include is None)
    if not set(tasks) <= set(manager.all_tasks):
        manager = TaskManager(**own)  # lm_eval's own ones are thousands of files
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise ValueError(f"lm_eval knows no task {unknown[0]}; name its folder, or see `lm-eval ls tasks`.")
    results = lm_eval.simple_evaluate(
        model=lm,
        tasks=list(tasks),
        task_manager=manager,
        num_fewshot=num_fewshot,
        limit=limit,
        use_cache=None if cache is None else lm.cache_file(cache),
        batch_size=lm.batch_size,
        fewshot_random_seed=seed,
        log_samples=False,
    )
    kept = ("results", "groups", "versions", "n-shot", "n-samples", "higher_is_better", "config", "date")
    return {name: results[name] for name in kept if name in results} | lm.about


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
