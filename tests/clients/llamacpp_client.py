"""Run by llama.cpp (xllamacpp) and gguf: the exported folder as a GGUF file, then ids and greedy continuations.

llama.cpp's own converter is a script that no wheel carries; what it does for a Llama is written here from its facts:
gguf's tables of names, its readers of vocabularies (``SentencePieceVocab``, ``SpecialVocab``), ``add_prefix_space`` and
rows of q and k in the order of interleaved RoPE.
"""

import json
import sys
import urllib.request
from pathlib import Path

import gguf
import numpy as np
import torch
import xllamacpp
from gguf.vocab import SentencePieceVocab, SpecialVocab
from safetensors.torch import load_file

folder, request, answer = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
asked = json.loads(Path(request).read_text(encoding="utf-8"))
hf = json.loads((folder / "config.json").read_text())
settings = json.loads((folder / "tokenizer_config.json").read_text())


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


file = answer.parent / "ours.gguf"
writer = gguf.GGUFWriter(file, "llama")
layers, heads, groups = hf["num_hidden_layers"], hf["num_attention_heads"], hf["num_key_value_heads"]
writer.add_block_count(layers)
writer.add_context_length(hf["max_position_embeddings"])
writer.add_embedding_length(hf["hidden_size"])
writer.add_feed_forward_length(hf["intermediate_size"])
writer.add_head_count(heads)
writer.add_head_count_kv(groups)
writer.add_layer_norm_rms_eps(hf["rms_norm_eps"])
writer.add_rope_freq_base(hf["rope_theta"])
writer.add_rope_dimension_count(hf["head_dim"])
writer.add_vocab_size(hf["vocab_size"])
writer.add_file_type(gguf.LlamaFileType.ALL_F32)
tokens, scores, kinds = zip(*SentencePieceVocab(folder).all_tokens(), strict=True)
writer.add_tokenizer_model("llama")
writer.add_tokenizer_pre("default")
writer.add_token_list(list(tokens))
writer.add_token_scores(list(scores))
writer.add_token_types([int(kind) for kind in kinds])
if "add_prefix_space" in settings:
    writer.add_add_space_prefix(settings["add_prefix_space"])
special = SpecialVocab(folder, n_vocab=len(tokens))
special.add_to_gguf(writer)
names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
for path in sorted(folder.glob("*.safetensors")):
    for name, tensor in load_file(path).items():
        value = tensor.to(torch.float32).numpy()
        for part, count in (("q_proj", heads), ("k_proj", groups)):
            if part in name:
                value = interleaved(value, count)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), value)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()

params = xllamacpp.CommonParams()
params.model.path = str(file)
params.n_ctx, params.n_parallel, params.warmup = hf["max_position_embeddings"], 1, False
params.cpuparams.n_threads = 1
server = xllamacpp.Server(params)


def ask(place: str, **what: object) -> dict:
    data = json.dumps(what).encode()
    headers = {"Content-Type": "application/json"}
    with urllib.request.urlopen(
        urllib.request.Request(server.listening_address + place, data, headers), timeout=60
    ) as reply:
        return json.load(reply)


def ids_of(text: str, add_special: bool) -> list:
    return ask("/tokenize", content=text, add_special=add_special, parse_special=False)["tokens"]


result = {
    "greedy": [
        ask("/completion", prompt=ids, n_predict=asked["new_tokens"], temperature=0, top_k=1, return_tokens=True,
            cache_prompt=False)["tokens"]
        for ids in asked["prompts"]
    ],
    "ids": [ids_of(text, add_special=False) for text in asked["texts"]],
    "ids_of_a_prompt": [ids_of(text, add_special=True) for text in asked["texts"]],
    "special": special.special_token_ids,
    "add_special": special.add_special_token,
}  # fmt: skip
Path(answer).write_text(json.dumps(result), encoding="utf-8")
