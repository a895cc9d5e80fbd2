"""Run by litgpt: its converter on a copy of the exported folder, then ids and greedy continuations of its own model."""

import json
import shutil
import sys
from pathlib import Path

import torch
from litgpt.config import Config, name_to_config
from litgpt.model import GPT
from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint
from litgpt.tokenizer import Tokenizer

folder, request, answer = sys.argv[1:]
asked = json.loads(Path(request).read_text(encoding="utf-8"))
hf = json.loads(Path(folder, "config.json").read_text())
copy = Path(answer).parent / "litgpt" / "ours"
shutil.copytree(folder, copy)
name_to_config["ours"] = dict(
    name="ours", hf_config={}, block_size=hf["max_position_embeddings"], vocab_size=hf["vocab_size"],
    padded_vocab_size=hf["vocab_size"], n_layer=hf["num_hidden_layers"], n_head=hf["num_attention_heads"],
    n_query_groups=hf["num_key_value_heads"], n_embd=hf["hidden_size"], head_size=hf["head_dim"],
    rotary_percentage=1.0, parallel_residual=False, bias=False, norm_class_name="RMSNorm",
    norm_eps=hf["rms_norm_eps"], mlp_class_name="LLaMAMLP", intermediate_size=hf["intermediate_size"],
    rope_base=int(hf["rope_theta"]),
)  # fmt: skip
convert_hf_checkpoint(copy, model_name="ours")
model = GPT(Config.from_name("ours")).float()
state = torch.load(copy / "lit_model.pth", weights_only=True)
model.load_state_dict(state.get("model", state))
model.eval()
greedy = []
for ids in asked["prompts"]:
    tokens = list(ids)
    for _ in range(asked["new_tokens"]):
        with torch.inference_mode():
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    greedy.append(tokens[len(ids) :])
tokenizer = Tokenizer(copy)
result = {
    "greedy": greedy,
    "ids": [tokenizer.encode(text, bos=False, eos=False).tolist() for text in asked["texts"] if text],
    "use_bos": tokenizer.use_bos,
    "bos": tokenizer.bos_id,
    "eos": tokenizer.eos_id,
}
Path(answer).write_text(json.dumps(result), encoding="utf-8")
