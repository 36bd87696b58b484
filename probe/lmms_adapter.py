"""Models for lmms-eval: a recipe on a backbone, and answers that were given already.

Both are simple ones in the harness's sense, which fit all its versions. The harness's generation settings are requests:
the recipe owns answer length, blocks and steps, and where it says nothing, the study's settings for the benchmark hold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lmms_eval.api.model import lmms

from probe.backbones import load
from probe.data.harness import reply, sample_of
from probe.data.sample import Sample
from probe.errors import ProbeError
from probe.lmms_settings import with_settings
from probe.recipe import Recipe, load_recipe
from probe.runner import pick_device, run
from probe.trace import open_trace


class _Simple(lmms):
    """What the harness asks of a model and this package has no use for."""

    is_simple = True

    def loglikelihood(self, requests: Any) -> Any:
        """Not to be had from a denoised answer."""
        raise ProbeError(
            "this task asks for likelihoods of given answers, which denoising does not give; use a task that generates"
        )

    def generate_until_multi_round(self, requests: Any) -> Any:
        """Not done: every sample is one question."""
        raise ProbeError(
            "this task asks in several rounds; probe answers one question a sample, so use a task with one"
        )


class Probe(_Simple):
    """A recipe on a backbone: `--model probe --model_args recipe=fastv,backbone=miniature,keep=0.25`.

    Further arguments turn the recipe's dials. Every task leaves a trace in `out/TASK` (default `runs/lmms_eval`).
    """

    def __init__(
        self,
        recipe: str | Recipe = "none",
        backbone: str | None = None,
        out: str = "runs/lmms_eval",
        dtype: str = "auto",
        batch_size: int | str = 1,
        max_batch_size: int | str | None = None,
        device: str | None = None,
        **dials: Any,
    ) -> None:
        super().__init__()
        sets = [f"{name}={value}" for name, value in dials.items()]
        made = recipe.with_sets(sets) if isinstance(recipe, Recipe) else load_recipe(recipe, sets)
        self.recipe = made if backbone is None else made.replace(backbone=backbone)
        self.out = Path(out)
        where = pick_device(device or "auto")
        self.backbone = load(self.recipe.backbone, device=where, dtype=dtype, **self.recipe.load)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """One reply per request, in order. A sample that fails gets an empty reply; its trace has the reason."""
        names = list(dict.fromkeys(request.args[4] for request in requests))
        found: dict[str, str] = {}
        for name in names:
            found |= self._answers(name, [r.args for r in requests if r.args[4] == name])
        return [reply(found.get(_id(request.args), ""), self.backbone.source) for request in requests]

    def _answers(self, name: str, requests: Sequence[Sequence[Any]]) -> dict[str, str]:
        """Replies by id for one task's requests, through a run that leaves a trace."""
        recipe = with_settings(self.recipe.replace(data={"lmms_eval": name}), self.backbone.source)
        samples = _Requests(self.task_dict, requests)
        folder = _free(self.out / name)
        result = run(recipe, backbone=self.backbone, samples=samples, out=folder, baseline=False, timed=False)
        if result.failed == result.samples:
            raise ProbeError(f"all {result.samples} samples of {name} failed: {'; '.join(result.notes[:3])}")
        with open_trace(result.trace) as trace:
            return dict(zip(trace.array("sample_id").tolist(), trace.array("prediction").tolist(), strict=True))


def _free(folder: Path) -> Path:
    """The folder, or the first of `folder-2`, `folder-3`, ... that is not there yet: traces are never replaced."""
    tried, number = folder, 2
    while tried.exists():
        tried, number = folder.with_name(f"{folder.name}-{number}"), number + 1
    return tried


def _id(args: Sequence[Any]) -> str:
    return f"{args[4]}/{args[3]}"


class _Requests(Sequence[Any]):
    """The harness's requests as samples, each made when it is its turn; one that cannot be made is its error."""

    def __init__(self, documents: Mapping[str, Any], requests: Sequence[Sequence[Any]]) -> None:
        self.documents, self.requests = documents, requests

    def __len__(self) -> int:
        return len(self.requests)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return _Requests(self.documents, self.requests[index])
        return self._sample(self.requests[index])

    def _sample(self, args: Sequence[Any]) -> Sample | ProbeError:
        text, _, doc_to_visual, number, name, split = args
        try:
            return sample_of(name, number, text, doc_to_visual(self.documents[name][split][number]))
        except ProbeError as error:
            return error
        except Exception as error:  # pictures and task code fail as they please
            return ProbeError(f"{name}, document {number}: {type(error).__name__}: {error}")


class Replay(_Simple):
    """Answers that a trace holds already, so that the harness scores them: by ``TASK/NUMBER``."""

    def __init__(self, answers: Mapping[str, str]) -> None:
        super().__init__()
        self.answers = answers

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The answer to each request; an empty one where there is none."""
        return [self.answers.get(_id(request.args), "") for request in requests]
