"""EleutherAI's lm-evaluation-harness on a run's mesh, for `run.py eval --tasks`; weights are not converted.

Every process runs the harness with the same requests, whose batches all of them compute together: requests
depend on the tasks and fixed seeds alone. Process 0 prints and records.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from spmd.core.fields import check, closest
from spmd.data.text.tokenizer import Tokenizer
from spmd.train import rundir
from spmd.train.judge import Scorer, complete
from spmd.train.metrics import Writer, read_lines
from spmd.train.sample import Choice, Steps
from spmd.train.snapshot import Snapshot

if TYPE_CHECKING:
    from etils import epath

    from spmd.experiment.base import Experiment

SUFFIXES = (".yaml", ".yml")
CODE = (
    "class",
    "hf_evaluate",
    "trust_remote_code",
    "unsafe_code",
)  # keys that name code to execute
MOST_TOKENS = 256  # of a continuation, where a task does not say


def check_installed() -> None:
    """ValueError without the package."""
    check(
        importlib.util.find_spec("lm_eval") is not None,
        "run.py eval --tasks needs a package that is not installed: pip install lm_eval",
    )


class HarnessModel:
    """A snapshot as the harness calls models; `build_model` joins it with the harness's base class."""

    def __init__(self, snapshot: Snapshot, tokenizer: Tokenizer, length: int, rows: int):
        super().__init__()
        self._snapshot, self._tokenizer = snapshot, tokenizer
        self._scorer = Scorer(snapshot, length, rows)
        self._steps = dict[Choice, Steps]()  # compiled

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self._edge(self._tokenizer.end, self._tokenizer.begin)

    @property
    def prefix_token_id(self) -> int:
        """The token that begins a text, which is the context where there is none."""
        return self._edge(self._tokenizer.begin, self._tokenizer.end)

    def _edge(self, *candidates: int | None) -> int:
        found = next((i for i in candidates if i is not None), None)
        check(
            found is not None,
            "the tokenizer has no token that begins or ends a text, after which tasks score the first one",
        )
        assert found is not None
        return found

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **options: Any
    ) -> list[int]:
        """Ids of a text, after the token that begins one where the tokenizer has it."""
        (ids,) = self._tokenizer.encode([string])
        begin = self._tokenizer.begin
        first = [] if begin is None or add_special_tokens is False else [begin]
        return [*first, *map(int, ids)]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **options: Any
    ) -> list[tuple[float, bool]]:
        return self._scorer.score([(context, rest) for _, context, rest in requests])

    def loglikelihood_rolling(self, requests: Sequence[Any], **options: Any) -> list[float]:
        """Log-likelihood of whole texts, in windows of the model's length, each token scored once."""
        utils = importlib.import_module("lm_eval.utils")
        windows, owner = [], []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            pairs = utils.get_rolling_token_windows(
                token_list=ids,
                prefix_token=self.prefix_token_id,
                max_seq_len=self._scorer.length,
                context_len=1,
            )
            for pair in map(utils.make_disjoint_window, pairs):
                windows.append(pair)
                owner.append(number)
        totals = [0.0] * len(requests)
        for number, (value, _) in zip(owner, self._scorer.score(windows), strict=True):
            totals[number] += value
        return totals

    def generate_until(self, requests: Sequence[Any], **options: Any) -> list[str]:
        """Continuations; those of like settings are decoded together."""
        texts = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(i)
        for group in groups.values():
            settings = requests[group[0]].args[1]
            for start in range(0, len(group), self._scorer.rows):
                chosen = group[start : start + self._scorer.rows]
                contexts = [requests[i].args[0] for i in chosen]
                for i, text in zip(chosen, self._complete(contexts, settings), strict=True):
                    texts[i] = text
        return texts

    def _complete(self, contexts: Sequence[str], settings: Mapping[str, Any]) -> list[str]:
        until = settings.get("until") or []
        until = [until] if isinstance(until, str) else list(until)
        length = self._scorer.length
        num = min(int(settings.get("max_gen_toks", MOST_TOKENS)), length - 1)
        prompts = [
            np.array((self.tok_encode(text) or [self.prefix_token_id])[-(length - num) :], np.int32)
            for text in contexts
        ]
        temperature = float(settings.get("temperature", 0.0)) if settings.get("do_sample") else 0.0
        choice = Choice(
            temperature=temperature,
            top_k=int(settings.get("top_k", 0)),
            top_p=float(settings.get("top_p", 1.0)),
        )
        if choice not in self._steps:
            vocab = self._tokenizer.vocab_size
            self._steps[choice] = Steps(self._snapshot, choice, 0, vocab)
        kwargs: Any = {"num_tokens": num, "choice": choice, "until": until}
        kwargs["steps"] = self._steps[choice]
        return complete(self._snapshot, self._tokenizer, prompts, **kwargs)


def build_model(*arguments: Any) -> Any:
    """A HarnessModel that is a model of the harness; arguments as of HarnessModel."""
    base = importlib.import_module("lm_eval.api.model").TemplateLM
    return type("MeshModel", (HarnessModel, base), {})(*arguments)


def judge(
    model: Any, tasks: Sequence[str], *, limit: int = 0, shots: int = -1, code: bool = False
) -> dict[str, Any]:
    """Run the harness on these tasks; returns its `results`, `samples` and others.

    Args:
        model: of build_model.
        tasks: names of the harness, or YAML files.
        limit: most documents of each task; 0 is all.
        shots: examples before each document; -1 is what the task says.
        code: whether task files may name Python, which is then executed.

    Raises:
        ValueError: a task that is unknown or cannot be read, or whose file names code.
    """
    files = [task for task in tasks if task.endswith(SUFFIXES)]
    named = [task for task in tasks if task not in files]
    manager = importlib.import_module("lm_eval.tasks").TaskManager(include_defaults=bool(named))
    for name in named:
        known = manager.all_tasks
        check(
            name in known,
            f"--tasks {name}: the harness has no such task.{closest(name, known)} A file of your own ends in"
            " .yaml",
        )
    specs = [*named, *(read_task(file, code) for file in files)]
    if not code:
        _sandbox_templates()
    evaluator = importlib.import_module("lm_eval.evaluator")
    try:
        return evaluator.simple_evaluate(
            model=model,
            tasks=specs,
            task_manager=manager,
            num_fewshot=None if shots < 0 else shots,
            limit=limit or None,
            bootstrap_iters=0,
            confirm_run_unsafe_code=code,
        )
    except (FileNotFoundError, ConnectionError, KeyError) as error:
        raise ValueError(
            f"--tasks {','.join(tasks)}: {type(error).__name__}: {error}. The data of a task come over the"
            " network unless its file names local ones (dataset_path: json, dataset_kwargs: data_files)"
        ) from None


def read_task(file: str, code: bool) -> dict[str, Any]:
    """The fields of a task file; data files are taken from its directory where they are there.

    Raises:
        ValueError: it is missing, is no YAML, or names code without `code`.
    """
    path = Path(file).expanduser()
    check(path.is_file(), f"--tasks {file}: no such file")
    yaml = importlib.import_module("yaml")
    try:
        reasons = [] if code else [*find_code(path, yaml)]
        loader = importlib.import_module("lm_eval.tasks._yaml_loader")
        check(
            not reasons,
            f"--tasks {file} would execute code: {'; '.join(reasons)}. Read it, then give --task-code if you"
            " trust it",
        )
        fields = loader.load_yaml(path, resolve_func=code)
    except (yaml.YAMLError, OSError) as error:
        raise ValueError(f"--tasks {file}: {error}") from None
    check("task" in fields, f"--tasks {file}: it has no field `task`, the name")
    options = fields.get("dataset_kwargs") or {}
    if "data_files" in options:
        fields["dataset_kwargs"] = options | {"data_files": _beside(path, options["data_files"])}
    return fields


def find_code(path: Path, yaml: Any) -> Iterator[str]:
    """Yield the Python that a task file, or one that it includes, names."""
    importlib.import_module("lm_eval.api.metrics")  # which registers them
    known = importlib.import_module("lm_eval.api.registry").metric_registry

    def visit(node: Any) -> Iterator[str]:
        if node.tag.startswith("!") or ":python/" in node.tag:
            yield f"{node.tag} {node.value if isinstance(node.value, str) else ''}".strip()
        if isinstance(node, yaml.SequenceNode):
            for each in node.value:
                yield from visit(each)
        pairs: Any = node.value if isinstance(node, yaml.MappingNode) else ()
        for key, value in pairs:
            yield from visit(value)
            text = str(value.value)
            if key.value in CODE and text.lower() not in ("false", "null", ""):
                yield f"{key.value}: {text}"
            elif key.value == "metric" and value.tag.endswith(":str") and text not in known:
                yield f"metric: {text}, which the harness does not have and would fetch"
            elif key.value == "include":
                names = value.value if isinstance(value.value, list) else [value]
                for each in names:
                    yield from find_code(path.parent / each.value, yaml)

    node = yaml.compose(path.read_text(), Loader=yaml.SafeLoader)
    if node is not None:
        yield from visit(node)


def _beside(path: Path, files: Any) -> Any:
    if isinstance(files, Mapping):
        return {split: _beside(path, each) for split, each in files.items()}
    if isinstance(files, list):
        return [_beside(path, each) for each in files]
    local = path.parent / str(files)
    return str(local.resolve()) if local.is_file() else files


def _sandbox_templates() -> None:
    """Let the harness render templates without access to Python's internals."""
    utils: Any = importlib.import_module("lm_eval.utils")
    sandbox = importlib.import_module("jinja2.sandbox")
    undefined = importlib.import_module("jinja2").StrictUndefined
    env = sandbox.SandboxedEnvironment(undefined=undefined, keep_trailing_newline=True)
    env.filters.update(utils.env.filters)
    utils.env = env


def metrics_of(results: Mapping[str, Any]) -> dict[str, float]:
    """`{"tasks/NAME/acc": ...}` of the harness's results; a filter that is not `none` follows the metric."""
    metrics: dict[str, float] = {}
    for task, values in results["results"].items():
        for key, value in values.items():
            metric, _, filter_name = key.partition(",")
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if number and metric not in ("sample_len",) and math.isfinite(value):
                suffix = "" if filter_name in ("", "none") else f"/{filter_name}"
                metrics[f"tasks/{task}/{metric}{suffix}"] = float(value)
    return metrics


def record(exp: Experiment, path: epath.Path, step: int, metrics: Mapping[str, float]) -> None:
    """Add metrics of a step to a finished run: summary.json, metrics.jsonl and the trackers.

    A run that is not finished may be written by another process: a note says that nothing is.
    """
    summary = rundir.summary(path)
    if summary is None:
        print(f"note: {path} is not finished: the results are printed only", file=sys.stderr)
        return
    last = max((int(line["step"]) for line in read_lines(path)), default=step)
    writer = Writer(path, last, exp.log, exp.config())
    writer.write(step, metrics)
    writer.close()
    kept = summary.get("tasks", {})
    rundir.write_summary(path, summary | {"tasks": kept | {str(step): dict(metrics)}})
