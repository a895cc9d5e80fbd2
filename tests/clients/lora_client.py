"""Run by peft and trl: one LoRA step on the exported folder; the adapter must change, the model must not."""

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

folder, request, answer = sys.argv[1], sys.argv[2], Path(sys.argv[3])
asked = json.loads(Path(request).read_text(encoding="utf-8"))
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
before = {name: weight.clone() for name, weight in model.named_parameters()}
trainer = SFTTrainer(
    model=model,
    args=SFTConfig(
        output_dir=str(answer.parent / "lora"), max_steps=1, per_device_train_batch_size=2, learning_rate=1e-2,
        report_to=[], use_cpu=True, bf16=False, max_length=64, save_strategy="no",
    ),
    train_dataset=Dataset.from_dict({"text": [text for text in asked["texts"] if text]}),
    processing_class=tokenizer,
    peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
)  # fmt: skip
trainer.train()
weights = dict(trainer.model.named_parameters())
adapters = {name: weight for name, weight in weights.items() if "lora_B" in name}
same = all(
    torch.equal(weight, before[name.removeprefix("base_model.model.").replace(".base_layer", "")])
    for name, weight in weights.items()
    if "lora_" not in name
)
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
losses += [entry["train_loss"] for entry in trainer.state.log_history if "train_loss" in entry]
result = {"loss": losses[-1], "adapters": len(adapters), "same": same,
          "changed": all(bool(weight.abs().max() > 0) for weight in adapters.values())}  # fmt: skip
Path(answer).write_text(json.dumps(result), encoding="utf-8")
