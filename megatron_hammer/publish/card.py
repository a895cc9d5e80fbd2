"""The model card: README.md of a published folder, in English and then in Chinese, from a run's ``CardFacts``.

Both languages have the same sections and the same tables. A section whose facts are not there is left out, and what is
not known is not stated. Needs no torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_hammer.base.language import Say, sayer
from megatron_hammer.base.tables import markdown_table
from megatron_hammer.publish.facts import CardFacts
from megatron_hammer.sampling.mixes import MixSource

# The Hub's short names of licences that are common for models; another one becomes "other" with its name beside it.
LICENSES = ("apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc0-1.0", "gpl-3.0",
            "openrail", "llama3", "llama3.1", "llama3.2", "gemma", "unknown", "other")  # fmt: skip

Rows = list[tuple[str, str]]


@dataclass(frozen=True)
class Wishes:
    """What only the people who publish can say."""

    name: str
    """Of the model."""
    repository: str | None
    """As a hub knows it, OWNER/NAME; None for a folder."""
    license: str | None
    languages: tuple[str, ...]
    description: str = ""
    """Text of theirs, for the beginning of the card."""


def model_card(facts: CardFacts, tree: Mapping[str, Any], wishes: Wishes) -> str:
    """README.md.

    Args:
        tree: the export's config.json.
    """
    parts = [_header(tree, wishes), f"# {wishes.name}\n\n[中文](#中文)"]
    if wishes.description:
        parts.append(wishes.description.strip())
    parts += _sections(facts, tree, wishes, sayer("en"))
    parts.append("---\n\n# 中文")
    parts += _sections(facts, tree, wishes, sayer("zh"))
    return "\n\n".join(parts) + "\n"


def _header(tree: Mapping[str, Any], wishes: Wishes) -> str:
    """What hubs read: YAML, written by hand so that its order is that of the fields' weight."""
    chosen = wishes.license or "unknown"
    lines = ["---", f"license: {chosen if chosen in LICENSES else 'other'}"]
    if chosen not in LICENSES:
        lines.append(f"license_name: {json.dumps(chosen, ensure_ascii=False)}")
    lines += ["language:", *(f"- {json.dumps(language, ensure_ascii=False)}" for language in wishes.languages)]
    lines += ["library_name: transformers", "pipeline_tag: text-generation"]
    lines += ["tasks:", "- text-generation", "frameworks:", "- Pytorch"]  # as ModelScope calls the same
    lines += ["tags:", f"- {tree['model_type']}", "- pretrained", "- megatron_hammer", "---"]
    return "\n".join(lines)


def _sections(facts: CardFacts, tree: Mapping[str, Any], wishes: Wishes, say: Say) -> list[str]:
    parts = [_opening(facts, tree, say)]
    parts += ["## " + say("Use", "使用"), _use(wishes), "## " + say("Model", "模型"), _model(facts, tree, say)]
    parts += ["## " + say("Training", "训练"), _training(facts, say)]
    if facts.phases:
        parts += ["## " + say("Data", "数据"), *_data(facts, say)]
    if facts.valid:
        parts += ["## " + say("Validation", "验证"), *_validation(facts, say)]
    if facts.evaluations:
        parts += ["## " + say("Evaluations", "评估"), *_evaluations(facts, say)]
    parts += ["## " + say("Certificate", "证书"), _certificate(facts, say)]
    parts += ["## " + say("Limits", "局限"), _limits(wishes, say)]
    return parts


def _opening(facts: CardFacts, tree: Mapping[str, Any], say: Say) -> str:
    size = f"{facts.parameters:,}"
    read = (
        ""
        if facts.tokens is None
        else say(f", pretrained on {facts.tokens:,} tokens", f"，预训练 {facts.tokens:,} 个 token")
    )
    ends = ""
    if not facts.is_finished:
        done, planned = f"{facts.step:,}", f"{facts.config.train.num_steps:,}"
        ends = say(f" This is step {done} of a run of {planned} steps.", f"这是一次 {planned} 步训练的第 {done} 步。")
    kind = tree["architectures"][0]
    return say(
        f"A base language model of {size} parameters ({kind}){read}, trained with megatron_hammer.{ends}",
        f"一个基座语言模型，{size} 个参数（{kind}）{read}，用 megatron_hammer 训练。{ends}",
    )


def _use(wishes: Wishes) -> str:
    where = wishes.repository or "PATH_OF_THIS_FOLDER"
    lines = [
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'tokenizer = AutoTokenizer.from_pretrained("{where}")',
        f'model = AutoModelForCausalLM.from_pretrained("{where}")',
        'tokens = tokenizer("import numpy", return_tensors="pt")',
        "print(tokenizer.decode(model.generate(**tokens, max_new_tokens=50)[0], skip_special_tokens=True))",
        "```",
    ]
    return "\n".join(lines)


def _model(facts: CardFacts, tree: Mapping[str, Any], say: Say) -> str:
    model = facts.config.model
    rows: Rows = [
        (say("parameters", "参数量"), f"{facts.parameters:,}"),
        (say("layers", "层数"), f"{model.num_layers}"),
        (say("hidden size", "隐藏维度"), f"{model.hidden_size:,}"),
        (say("feed-forward size", "前馈维度"), f"{model.ffn_hidden_size:,}"),
        (say("attention heads, of which keys and values have", "注意力头数，其中键值头数"),
         f"{model.num_attention_heads}, {model.query_groups}"),
        (say("head size", "每头维度"), f"{model.head_size}"),
        (say("vocabulary", "词表"), f"{model.vocab_size:,}"),
        (say("context", "上下文长度"), f"{model.max_position_embeddings:,}"),
        (say("embedding and head share weights", "输入输出词嵌入共享"),
         say("yes", "是") if model.tie_word_embeddings else say("no", "否")),
        (say("type of the weights", "权重类型"), str(tree.get("torch_dtype") or tree.get("dtype"))),
    ]  # fmt: skip
    return markdown_table((say("size", "项目"), ""), rows)


def _training(facts: CardFacts, say: Say) -> str:
    train, optimizer, schedule = facts.config.train, facts.config.optimizer, facts.config.schedule
    tokens_a_step = train.global_batch_size * facts.config.data.seq_length
    betas = f"{optimizer.beta1:g}, {optimizer.beta2:g}"
    decay, clip = f"{optimizer.weight_decay:g}", f"{optimizer.clip_grad:g}"
    rows: Rows = [
        (say("steps", "步数"), f"{facts.step:,} / {train.num_steps:,}"),
        *([(say("tokens", "token 数"), f"{facts.tokens:,}")] if facts.tokens is not None else []),
        (say("tokens of a step", "每步 token 数"), f"{tokens_a_step:,}"),
        (say("optimizer", "优化器"),
         say(f"{optimizer.style}, betas {betas}, weight decay {decay}, clip {clip}",
             f"{optimizer.style}，beta {betas}，权重衰减 {decay}，梯度裁剪 {clip}")),
        (say("learning rate", "学习率"),
         f"{optimizer.lr:g} -> {optimizer.min_lr:g}"
         + say(f", {schedule.style}, warm-up {schedule.warmup_steps:,}",
               f"，{schedule.style}，预热 {schedule.warmup_steps:,} 步")),
        (say("precision", "精度"), train.precision),
        (say("attention across documents", "跨文档注意力"),
         say("no", "否") if facts.config.data.attention_mask == "document" else say("yes", "是")),
        (say("seed", "随机种子"), f"{train.seed}"),
        *([(say("training loss at the end", "末段训练损失"), f"{facts.loss:.4f}")] if facts.loss is not None else []),
    ]  # fmt: skip
    return markdown_table((say("setting", "设置"), ""), rows)


def _data(facts: CardFacts, say: Say) -> list[str]:
    weights, parts = facts.config.data.weights, []
    kind = {"share": say("share", "占比"), "tokens": say("tokens to draw", "取用 token 数"),
            "epochs": say("passes asked for", "设定遍数")}  # fmt: skip
    for number, mix in enumerate(facts.phases, start=1):
        if len(facts.phases) > 1:
            length = f" ({mix.length})" if mix.length else ""
            parts.append("### " + say(f"Phase {number}", f"第 {number} 阶段") + length)
        total = sum(source.weight for source in mix.sources)
        rows = [_source_row(source, total if weights == "share" else None) for source in mix.sources]
        head = (
            say("source", "数据源"),
            kind[weights],
            say("tokens read in all", "共读 token 数"),
            say("passes", "遍数"),
        )
        parts.append(markdown_table(head, rows))
    return parts


def _source_row(source: MixSource, total: float | None) -> tuple[str, ...]:
    weight = f"{source.weight / total:.1%}" if total else f"{source.weight:,g}"
    read = "" if source.tokens_read is None else f"{source.tokens_read:,}"
    return source.name, weight, read, "" if source.passes is None else f"{source.passes:.2f}"


def _validation(facts: CardFacts, say: Say) -> list[str]:
    figures = {"loss": say("loss", "损失"), "perplexity": say("perplexity", "困惑度"),
               "bits_per_byte": say("bits per byte", "每字节比特"),
               "bits_per_character": say("bits per character", "每字符比特")}  # fmt: skip
    known = [name for name in figures if any(name in found for found in facts.valid.values())]
    rows = [
        (name, *(f"{found[figure]:.4f}" if figure in found else "" for figure in known))
        for name, found in facts.valid.items()
    ]
    return [
        say(f"Held-out text, at step {facts.valid_step:,}. Perplexity is per token of this tokenizer; bits per byte "
            "and per character compare models with different ones.",
            f"留出文本，第 {facts.valid_step:,} 步。困惑度按本分词器的 token 计；"
            "每字节、每字符比特可在不同分词器的模型之间比较。"),
        markdown_table((say("set", "验证集"), *(figures[name] for name in known)), rows),
    ]  # fmt: skip


def _evaluations(facts: CardFacts, say: Say) -> list[str]:
    step = facts.evaluations_step
    rows = [(name, f"{value:.4f}") for name, value in facts.evaluations.items()]
    return [say(f"At step {step:,}.", f"第 {step:,} 步。"), markdown_table((say("figure", "指标"), ""), rows)]


def _certificate(facts: CardFacts, say: Say) -> str:
    proof = facts.certificate
    worst = max(proof["texts"].values(), key=lambda found: found["max_difference"] / (found["max_logit"] or 1.0))
    versions = ", ".join(f"{name} {version}" for name, version in proof["versions"].items())
    difference, largest = f"{worst['max_difference']:.2g}", f"{worst['max_logit']:.3g}"
    return say(
        f"This folder was compared with the trained checkpoint before it was published (`certificate.json`): every "
        f"tensor is equal bit for bit in {proof['dtype']}, the tokenizer gives the same ids, and the logits of fixed "
        f"texts differ from transformers' by at most {difference}, the largest being {largest} (bound: "
        f"{proof['bound']:g} of it). Step {proof['step']:,}, checkpoint `{proof['checkpoint_digest']}`; {versions}.",
        f"本目录在发布前与训练得到的检查点逐项比对过（`certificate.json`）：每个张量在 {proof['dtype']} 下逐位相等，"
        f"分词器给出相同的 id，固定文本的 logits 与 transformers 之差最多为 {difference}，"
        f"最大的 logit 为 {largest}（上限：它的 {proof['bound']:g}）。"
        f"第 {proof['step']:,} 步，检查点 `{proof['checkpoint_digest']}`；{versions}。",
    )


def _limits(wishes: Wishes, say: Say) -> str:
    text = say(
        "It continues text and was not taught to follow instructions; it may state what is false, and repeats what its "
        "data say. Fine-tune and evaluate it for your purpose before you rely on it.",
        "它只会续写文本，没有经过指令微调；可能说出不实的内容，也会重复数据中的偏见。用于实际场景之前，请先微调并评估。",
    )
    if wishes.license is None:
        text += say("\n\nNo licence was stated.", "\n\n未声明许可证。")
    return text
