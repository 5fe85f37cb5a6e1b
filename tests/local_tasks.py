"""Task files of lm-evaluation-harness with documents beside them, and a run that they judge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CHOICE = """task: local_choice
dataset_path: json
dataset_kwargs: {data_files: {test: items.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list:
  - metric: acc
"""
ROLLING = """task: local_rolling
dataset_path: json
dataset_kwargs: {data_files: {test: items.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - metric: byte_perplexity
"""
COMPLETE = """task: local_complete
dataset_path: json
dataset_kwargs: {data_files: {test: items.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{text}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 8, do_sample: false}
metric_list:
  - metric: exact_match
"""
TASKS = "choice.yaml,rolling.yaml,complete.yaml"
RUN = ("--experiment", "hf", "--model.layers", "1", "--data.files", "text.txt", "--run.dir", "run")


def write(directory: Path) -> list[dict[str, Any]]:
    """Write the task files, their documents, and the text that RUN trains on; returns the documents."""
    (directory / "text.txt").write_text("def f(x): return x + 1\nimport os\n" * 200)
    for name, text in (("choice", CHOICE), ("rolling", ROLLING), ("complete", COMPLETE)):
        (directory / f"{name}.yaml").write_text(text)
    items = [
        {
            "question": f"def f{i}(x): return",
            "choices": [" x", " x + 1", " naïve"],
            "answer": i % 3,
            "text": "import os\nclass C:\n    pass\n" * (1 + 3 * (i % 3)),
        }
        for i in range(6)
    ]
    (directory / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    return items
