"""Samples of a task of lmms-eval, with its prompts, its pictures and its scores. Imports the harness where it is used.

The harness's requests become samples, which a run answers like any others; what it makes of all answers together is
`probe.lmms_score`'s business.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from PIL import Image

from probe.data.sample import Sample
from probe.data.video import FRAMES, read_clip
from probe.errors import ProbeError
from probe.registry import nearest
from probe.study.printed import backbone_of

HOW = "pip install 'dmllm-probe[lmms]'"
_LMMS_TASKS = Path(__file__).resolve().parent.parent / "lmms_tasks"


@contextlib.contextmanager
def harness(task: str) -> Iterator[None]:
    """Whatever goes wrong inside the harness is one `ProbeError`; what it prints goes to the standard error."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            _quiet()
            yield
    except ProbeError:
        raise
    except (Exception, SystemExit) as caught:  # task code raises and exits as it pleases
        tried = getattr(caught, "last_attempt", None)  # the harness tries some things again and hides the reason
        error = (tried.exception() if tried is not None else None) or caught
        words = " ".join(str(error).split())[:300]
        told = f"{type(error).__name__}: {words}" if words else type(error).__name__
        raise ProbeError(f"lmms-eval failed on `{task}`: {told}") from error


@cache
def _quiet() -> None:
    """Import the harness and keep it from logging every step."""
    try:
        version("lmms-eval")
        import lmms_eval  # noqa: F401
        from loguru import logger
    except (ImportError, PackageNotFoundError) as error:
        raise ProbeError(f"a task of lmms-eval takes lmms-eval itself ({error}): {HOW}") from None
    logger.remove()
    logger.add(sys.stderr, level="ERROR")


@cache
def task_manager(include_path: str | None) -> Any:
    """The harness's index of tasks, with ours and with those in a folder of the user's own. Read once."""
    from lmms_eval.tasks import TaskManager

    if include_path is not None and not Path(include_path).is_dir():
        raise ProbeError(f"data.include_path: there is no folder {include_path} with task files")
    own = [] if include_path is None else [include_path]
    return TaskManager(verbosity="ERROR", include_path=[str(_LMMS_TASKS), *own])


def tasks_of(name: str, manager: Any) -> dict[str, Any]:
    """The harness's task objects that a name stands for: itself, or the members of a group."""
    from lmms_eval.tasks import get_task_dict

    known = list(manager.all_tasks)
    if name not in known:
        raise ProbeError(f"lmms-eval has no task `{name}`; {nearest(name, known)}")
    found: dict[str, Any] = {}

    def collect(tree: Mapping[Any, Any]) -> None:
        for key, value in tree.items():
            if isinstance(value, Mapping):
                collect(value)
            else:
                task = value[1] if isinstance(value, tuple) else value
                found[str(task.config.task or key)] = task

    collect(get_task_dict([name], manager))
    return found


def from_harness(
    name: str, *, include_path: str | None = None, limit: int | None = None, backbone: str = ""
) -> Iterator[Sample]:
    """Samples of a task or of a group's tasks, one after the other; of each task the first `limit`.

    Ids are ``TASK/NUMBER`` with the harness's number of the document. `backbone` decides what becomes of a reply before
    it is scored (`reply`). Reading may go on after a sample whose pictures are damaged.
    """
    with harness(name):
        requests = []
        for task in tasks_of(name, task_manager(include_path)).values():
            if task.OUTPUT_TYPE != "generate_until":
                raise ProbeError(f"the task `{name}` wants {task.OUTPUT_TYPE}; a denoised answer serves generate_until")
            task.build_all_requests(limit=limit)
            requests += [(task, instance.args) for instance in task.instances]
    return map(partial(_sample, backbone), requests)


def _sample(backbone: str, request: tuple[Any, Sequence[Any]]) -> Sample:
    task, (text, _, doc_to_visual, number, name, split) = request
    with harness(name):
        doc = task.dataset[split][number]
        return sample_of(
            name, number, text, doc_to_visual(doc), answers=_references(task, doc), judge=_judge(task, doc, backbone),
            metric=f"lmms_eval:{name}",
        )  # fmt: skip


def sample_of(name: str, number: int, text: str, visuals: Sequence[Any], **more: Any) -> Sample:
    """A request of the harness as a sample: pictures, or one clip by its path."""
    where = f"{name}, document {number}"
    seen = list(visuals or ())
    if seen and all(isinstance(item, Image.Image) for item in seen):
        return Sample(f"{name}/{number}", tuple(item.convert("RGB") for item in seen), text, task=name, **more)
    if len(seen) == 1 and isinstance(seen[0], str):
        return Sample(f"{name}/{number}", (), text, task=name, frames=read_clip(seen[0], FRAMES), **more)
    if not seen:
        return Sample(f"{name}/{number}", (), text, task=name, **more)
    kinds = ", ".join(sorted({type(item).__name__ for item in seen}))
    raise ProbeError(f"{where}: {kinds} cannot be shown to a backbone; pictures, or one clip, can")


def reply(text: str, backbone: str) -> str:
    """What a backbone's published evaluation makes of a reply before scoring it.

    LLaDA-V's drops one full stop at the end, LaViDa's exclamation marks at the beginning.
    """
    text = text.strip()
    if "llada-v" in backbone.casefold():
        return text.removesuffix(".")
    return text.lstrip("!") if "lavida" in backbone_of(backbone).casefold() else text


def _references(task: Any, doc: Any) -> tuple[str, ...]:
    target = task.doc_to_target(doc)
    several = target if isinstance(target, list | tuple) else [target]
    return tuple(str(item) for item in several if item is not None)


def _judge(task: Any, doc: Any, backbone: str) -> Any:
    """Scores a prediction by the task's own rule; None where that takes all answers, or a model as a judge."""
    metrics = [str(entry.get("metric", "")) for entry in task.config.metric_list or ()]
    if any("gpt" in metric or "judge" in metric for metric in metrics):
        return None

    def judge(prediction: str) -> float:
        with harness(task.config.task):
            return number_in(task.process_results(doc, [reply(prediction, backbone)]))

    return judge


def number_in(results: Mapping[str, Any]) -> float:
    """The score in what a task makes of one answer: the first number, or the first `score`; NaN where there is none."""
    for value in results.values():
        if isinstance(value, Mapping):
            value = value.get("score")
        if isinstance(value, bool | int | float) and not math.isnan(value):
            return float(value)
    return math.nan
