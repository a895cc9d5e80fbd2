"""Run by transformers of some version: ids of texts, greedy continuations, and a padded batch."""

import json
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, request, answer = sys.argv[1:]
asked = json.loads(Path(request).read_text(encoding="utf-8"))
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()
greedy = []
for ids in asked["prompts"]:
    tokens = torch.tensor([ids])
    with torch.inference_mode():
        out = model.generate(tokens, max_new_tokens=asked["new_tokens"], do_sample=False, eos_token_id=None)
    greedy.append(out[0, len(ids) :].tolist())
padded = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer, batch_size=2)
texts = padded(asked["texts"][1:5], max_new_tokens=4, do_sample=False)
result = {
    "version": transformers.__version__,
    "ids": [tokenizer(text)["input_ids"] for text in asked["texts"]],
    "decoded": [tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) for text in asked["texts"]],
    "greedy": greedy,
    "batch": [out[0]["generated_text"] for out in texts],
    "model_max_length": tokenizer.model_max_length,
    "prompt_bos": [tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]],
}
Path(answer).write_text(json.dumps(result), encoding="utf-8")
