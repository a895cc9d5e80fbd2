"""Run by lm-eval: a multiple-choice task from local files on the exported folder; every log-likelihood of a choice."""

import json
import sys
from pathlib import Path

import lm_eval
from lm_eval.tasks import TaskManager

folder, request, answer = sys.argv[1], sys.argv[2], Path(sys.argv[3])
asked = json.loads(Path(request).read_text(encoding="utf-8"))
tasks = answer.parent / "tasks"
tasks.mkdir()
questions = [{"q": q, "choices": choices, "gold": 0} for q, choices in asked["choices"]]
(tasks / "questions.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions), encoding="utf-8")
(tasks / "ours.yaml").write_text(
    "task: ours\ndataset_path: json\n"
    f"dataset_kwargs: {{data_files: {{test: {tasks / 'questions.jsonl'}}}}}\n"
    "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_choice: '{{choices}}'\n"
    "doc_to_target: '{{gold}}'\ntarget_delimiter: ''\nmetric_list: [{metric: acc}]\n"
)
found = lm_eval.simple_evaluate(
    model="hf", model_args={"pretrained": folder, "dtype": "float32"}, tasks=["ours"], device="cpu", batch_size=1,
    task_manager=TaskManager(include_path=str(tasks), include_defaults=False), log_samples=True, bootstrap_iters=0,
)  # fmt: skip
samples = sorted(found["samples"]["ours"], key=lambda sample: sample["doc_id"])
result = {"loglikelihoods": [[r[0] for r in sample["filtered_resps"]] for sample in samples]}
Path(answer).write_text(json.dumps(result), encoding="utf-8")
