"""Continue a text with a Hugging Face folder, by transformers alone, as the published guide does it.

python examples/reproduce/generate.py FOLDER TEXT
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, text = sys.argv[1:]
device = "cuda" if torch.cuda.is_available() else "cpu"
tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=False, trust_remote_code=False, use_safetensors=True)
model = AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.bfloat16, trust_remote_code=False, use_safetensors=True
).to(device)
ids = tokenizer(text, return_tensors="pt").input_ids.to(device)
output = model.generate(input_ids=ids, max_length=ids.shape[1] + 100, do_sample=True, top_p=0.95)
print(tokenizer.decode(output[0]))
