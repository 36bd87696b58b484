"""A task of lmms-eval on local files: a few questions about the miniature's world. No network."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

TASK = """
task: toy_colour
dataset_path: parquet
dataset_kwargs: {data_files: {test: test.parquet}}
test_split: test
output_type: generate_until
doc_to_visual: !function toy_utils.doc_to_visual
doc_to_text: !function toy_utils.doc_to_text
doc_to_target: "answer"
process_results: !function toy_utils.process_results
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
lmms_eval_specific_kwargs:
  default: {pre_prompt: "", post_prompt: ""}
"""
BROKEN = TASK.replace("toy_colour", "toy_broken").replace("toy_utils.process_results", "toy_utils.process_badly")
UTILS = """
def doc_to_visual(doc):
    return [doc["image"].convert("RGB")]


def doc_to_text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]


def process_results(doc, results):
    return {"exact_match": float(results[0].strip().lower() == doc["answer"].lower())}


def process_badly(doc, results):
    raise RuntimeError("the scorer is out of order")
"""


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the task `toy_colour`: four questions, and one whose answer is wrong on purpose."""
    datasets = pytest.importorskip("datasets")
    from probe.data import load

    folder = tmp_path_factory.mktemp("tasks") / "toy"
    folder.mkdir()
    samples = list(load("world/colour", 4))
    rows: dict[str, list[object]] = {"image": [], "question": [], "answer": []}
    for number, sample in enumerate(samples):
        buffer = io.BytesIO()
        sample.images[0].save(buffer, "PNG")
        rows["image"].append({"bytes": buffer.getvalue(), "path": None})
        rows["question"].append(sample.question)
        rows["answer"].append("plaid" if number == 3 else sample.answers[0])
    built = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    built.to_parquet(folder / "test.parquet")
    (folder / "toy_colour.yaml").write_text(TASK)
    (folder / "toy_broken.yaml").write_text(BROKEN)
    (folder / "toy_utils.py").write_text(UTILS)
    return folder
