"""Remedies for settings that are misspelt or written as another program would: the name and form that they have here.

The names of other programs are those of Megatron-LM, Hugging Face's Trainer and configs, torchtitan and GPT-NeoX, and
common abbreviations such as "lr" and "batch size". Needs no torch.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_hammer.base.characters import TYPOGRAPHIC_QUOTES, in_ascii, is_number, is_quoted, number_meant
from megatron_hammer.base.paths import unusable_remedy
from megatron_hammer.config.presets import PRESETS

_TEXT_ENDINGS = (".jsonl", ".json", ".txt", ".parquet", ".gz", ".zst", ".csv", ".md", ".docx", ".pdf")
_DATASET_ENDINGS = (".bin", ".idx", ".meta.json")

OTHER_NAMES = {  # last part of a name, without - and _ -> our setting, or one of its values
    "learningrate": "optimizer.lr",
    "maxlr": "optimizer.lr",
    "minlearningrate": "optimizer.min_lr",
    "wd": "optimizer.weight_decay",
    "adambeta1": "optimizer.beta1",
    "adambeta2": "optimizer.beta2",
    "adameps": "optimizer.eps",
    "adamepsilon": "optimizer.eps",
    "epsilon": "optimizer.eps",
    "gradclip": "optimizer.clip_grad",
    "gradientclipping": "optimizer.clip_grad",
    "maxgradnorm": "optimizer.clip_grad",
    "maxnorm": "optimizer.clip_grad",
    "lrdecaystyle": "schedule.style",
    "lrscheduler": "schedule.style",
    "lrschedulertype": "schedule.style",
    "scheduler": "schedule.style",
    "warmup": "schedule.warmup_steps",
    "warmupiters": "schedule.warmup_steps",
    "lrwarmupiters": "schedule.warmup_steps",
    "lrdecayiters": "schedule.decay_steps",
    "lrwsddecayiters": "schedule.anneal_steps",
    "optim": "optimizer.style",
    "optimizer": "optimizer.style",
    "decayiters": "schedule.decay_steps",
    "steps": "train.num_steps",
    "maxsteps": "train.num_steps",
    "trainiters": "train.num_steps",
    "trainsteps": "train.num_steps",
    "iters": "train.num_steps",
    "iterations": "train.num_steps",
    "totalsteps": "train.num_steps",
    "batchsize": "train.global_batch_size",
    "perdevicetrainbatchsize": "train.micro_batch_size",
    "microbatch": "train.micro_batch_size",
    "mbs": "train.micro_batch_size",
    "trainbatchsize": "train.global_batch_size",
    "rampupbatchsize": "train.batch_size_ramp",
    "gbs": "train.global_batch_size",
    "outputdir": "train.output",
    "out": "train.output",
    "save": "train.output",
    "bf16": "train.precision=bf16",
    "fp16": "train.precision=fp16",
    "dtype": "train.precision",
    "torchdtype": "train.precision",
    "mixedprecision": "train.precision",
    "gradientcheckpointing": "train.recompute",
    "activationcheckpointing": "train.recompute",
    "recomputeactivations": "train.recompute",
    "recomputegranularity": "train.recompute",
    "checkpointactivations": "train.recompute",
    "evalinterval": "train.eval_interval_steps",
    "evalsteps": "train.eval_interval_steps",
    "evaliters": "train.eval_samples",
    "saveinterval": "checkpoint.save_interval_steps",
    "saveretaininterval": "checkpoint.keep_every_steps",
    "checkpointfactor": "checkpoint.save_interval_steps",
    "keeplastncheckpoints": "checkpoint.keep_last",
    "asyncsave": "checkpoint.mode=background",
    "frompretrained": "checkpoint.init_from",
    "savesteps": "checkpoint.save_interval_steps",
    "savetotallimit": "checkpoint.keep_last",
    "load": "checkpoint.init_from",
    "loggingsteps": "log.interval_steps",
    "loginterval": "log.interval_steps",
    "wandb": "log.trackers=[wandb]",
    "usewandb": "log.trackers=[wandb]",
    "wandbproject": "log.tracker_project",
    "project": "log.tracker_project",
    "swanlab": "log.trackers=[swanlab]",
    "mlflow": "log.trackers=[mlflow]",
    "prometheus": "log.trackers=[prometheus]",
    "prometheusport": "log.prometheus_address",
    "opentelemetry": "log.trackers=[opentelemetry]",
    "otel": "log.trackers=[opentelemetry]",
    "reportto": "log.trackers",
    "tp": "parallel.tensor_model_parallel_size",
    "tpsize": "parallel.tensor_model_parallel_size",
    "tensorparallel": "parallel.tensor_model_parallel_size",
    "tensorparallelsize": "parallel.tensor_model_parallel_size",
    "tensorparalleldegree": "parallel.tensor_model_parallel_size",
    "modelparallelsize": "parallel.tensor_model_parallel_size",
    "pp": "parallel.pipeline_model_parallel_size",
    "ppsize": "parallel.pipeline_model_parallel_size",
    "pipelineparallel": "parallel.pipeline_model_parallel_size",
    "pipelineparalleldegree": "parallel.pipeline_model_parallel_size",
    "virtualpipelinemodelparallelsize": "parallel.virtual_pipeline_stages",
    "vpp": "parallel.virtual_pipeline_stages",
    "pipelinemodelparallellayout": "parallel.pipeline_split",
    "sp": "parallel.sequence_parallel",
    "zerostage": "parallel.shard",
    "numdistributedoptimizerinstances": "parallel.shard_size",
    "dim": "model.hidden_size",
    "dmodel": "model.hidden_size",
    "nembd": "model.hidden_size",
    "hidden": "model.hidden_size",
    "intermediatesize": "model.ffn_hidden_size",
    "ffn": "model.ffn_hidden_size",
    "layers": "model.num_layers",
    "nlayers": "model.num_layers",
    "nlayer": "model.num_layers",
    "numhiddenlayers": "model.num_layers",
    "heads": "model.num_attention_heads",
    "nheads": "model.num_attention_heads",
    "nhead": "model.num_attention_heads",
    "numheads": "model.num_attention_heads",
    "kvheads": "model.num_query_groups",
    "nkvheads": "model.num_query_groups",
    "numkvheads": "model.num_query_groups",
    "numkeyvalueheads": "model.num_query_groups",
    "kvchannels": "model.head_dim",
    "rmsnormeps": "model.norm_eps",
    "layernormepsilon": "model.norm_eps",
    "rotarybase": "model.rope_theta",
    "rotaryembbase": "model.rope_theta",
    "ropebase": "model.rope_theta",
    "initmethodstd": "model.init_std",
    "initializerrange": "model.init_std",
    "tieembeddings": "model.tie_word_embeddings",
    "noweighttying": "model.tie_word_embeddings",
    "seqlen": "data.seq_length",
    "maxseqlen": "data.seq_length",
    "sequencelength": "data.seq_length",
    "contextlength": "data.seq_length",
    "blocksize": "data.seq_length",
    "datapath": "data.train",
    "trainpath": "data.train",
    "trainfile": "data.train",
    "traindata": "data.train",
    "dataset": "data.train",
    "validdata": "data.valid",
    "validdatapath": "data.valid",
    "validdatapaths": "data.valid",
    "phasetransitioniterations": "data.phases",
    "validationfile": "data.valid",
    "tokenizermodel": "tokenizer.path",
    "vocabfile": "tokenizer.path",
    "tokenizernameorpath": "tokenizer.path",
    "flashattention": "kernels.attention",
    "useflashattn": "kernels.attention",
    "attnimplementation": "kernels.attention",
    "torchcompile": "kernels.compile",
    "cudagraphs": "kernels.cuda_graph",
    "fp8recipe": "kernels.fp8",
}
OTHER_VALUES = {  # of a choice
    "bfloat16": "bf16",
    "float16": "fp16",
    "half": "fp16",
    "gpu": "cuda",
    "nvidia": "cuda",
    "float32": "fp32",
    "float": "fp32",
    "flashattn2": "flash-attn",
    "flashattention2": "flash-attn",
    "flashattention": "flash-attn",
    "flashattn3": "flash-attn-3",
    "flashattn4": "flash-attn-4",
    "transformerengine": "te",
    "true": "",
    "warmupstabledecay": "wsd",
    "zero1": "optimizer",
    "zero2": "gradients",
    "zero3": "weights",
    "fsdp": "weights",
    "fsdp2": "weights",
    "fullshard": "weights",
}
_ELSEWHERE_VALUES = {  # a value that another setting has -> what it is written as; by a choice of the setting here
    ("fp8", "bf16"): "it is kernels.fp8 beside train.precision=bf16: write kernels.fp8=current",
    ("tensorboard", "wandb"): "it is written without being named: log.tensorboard=true is the default",
}


def nearest_setting(name: str, known: Sequence[str]) -> str:
    """The setting that a name which is none probably means: known elsewhere, of another group, or spelt alike."""
    last = name.rsplit(".", 1)[-1]
    other = OTHER_NAMES.get(_plain(last), "")
    if other.partition("=")[0] in known:
        return other
    elsewhere = [k for k in known if _plain(k.rsplit(".", 1)[-1]) == _plain(last)]
    if elsewhere:
        return elsewhere[0]
    groups = [k for k in known if "." not in k]
    if "." not in name and (close := difflib.get_close_matches(name, groups, n=1)):
        return close[0]
    in_group = [k for k in known if k.startswith(name.rsplit(".", 1)[0] + ".")]
    close = difflib.get_close_matches(name, in_group, n=1, cutoff=0.75)
    by_last = {k.rsplit(".", 1)[-1]: k for k in known if "." in k}
    close = close or [by_last[m] for m in difflib.get_close_matches(last, list(by_last), n=1, cutoff=0.7)]
    return (close or difflib.get_close_matches(name, known, n=1, cutoff=0.0))[0]


_ELSEWHERE = {  # what other programs have a setting or an option for and ours do not, without - and _
    **dict.fromkeys(("resume", "resumefromcheckpoint", "autoresume", "continue"),
                    "leave it out: the same command goes on from the newest checkpoint of train.output"),
    **dict.fromkeys(("gpus", "ngpus", "numgpus", "nprocpernode", "numprocesses"),
                    "--nproc N of python -m megatron_hammer.launch counts ranks, CUDA_VISIBLE_DEVICES chooses GPUs"),
    **dict.fromkeys(("hiddenact", "activation", "activationfunction", "hiddenactivation", "swiglu"),
                    "leave it out: the feed-forward part is SwiGLU, as in every Llama"),
    **dict.fromkeys(("dropout", "attentiondropout", "hiddendropout", "residpdrop", "attnpdrop"),
                    "leave it out: nothing is dropped, as in every Llama"),
    **dict.fromkeys(("normalization", "normtype"), "leave it out: the norm is RMSNorm; model.norm_eps is its epsilon"),
    **dict.fromkeys(("positionembeddingtype", "positionembedding"),
                    "leave it out: positions are RoPE's; model.rope_theta and model.rope_scaling say which"),
    **dict.fromkeys(("numworkers", "dataloadernumworkers"), "leave it out: samples are read ahead by themselves"),
    **dict.fromkeys(("deepspeed", "fsdp", "zero", "zerostage", "useddp", "ddp"),
                    "it is parallel.shard: optimizer (ZeRO 1, the default), gradients (2) or weights (3, FSDP)"),
    **dict.fromkeys(("epochs", "numepochs", "numtrainepochs", "maxepochs"),
                    "steps are counted: train.num_steps; the plan before training says how many make an epoch"),
    **dict.fromkeys(("gradientaccumulationsteps", "gradaccum", "accumulatesteps"),
                    "it follows: train.global_batch_size / (train.micro_batch_size x data-parallel ranks)"),
    **dict.fromkeys(("config", "configfile", "yaml"), "name the YAML file without an option in front of it"),
    "override": "write group.field=VALUE without an option in front of it",
}  # fmt: skip


def option_remedy(option: str, known: Sequence[str]) -> str:
    """What an option that a training program does not have is here: a setting, or something else; "" where unknown."""
    plain = _plain(option)
    setting = OTHER_NAMES.get(plain) or next((k for k in known if _plain(k.rsplit(".", 1)[-1]) == plain), "")
    if plain in _ELSEWHERE or not setting:
        return _ELSEWHERE.get(plain, "")
    return f"it is a setting here: write {setting}" + ("" if "=" in setting else "=VALUE")


def unknown_remedy(name: str, known: Sequence[str], in_file: bool) -> str:
    """What a name that is no setting's should be: the whole remedy.

    Args:
        in_file: it stands in a config file, where a whole name must be taken apart into group and field.
    """
    plain = in_ascii(name).strip()
    if not plain.isascii():
        return "settings have English names: see --help for every field"
    if plain in known and plain != name:
        return f"write {plain}, in plain ASCII characters and without blanks"
    if in_file and plain in known and "." in plain:
        group, field = plain.split(".", 1)
        return f"in a file it stands below its group: {group}: {{{field}: VALUE}}"
    elsewhere = _ELSEWHERE.get(_plain(plain.rsplit(".", 1)[-1]))
    return elsewhere or f"did you mean {nearest_setting(plain, known)}?"


def nearest_choice(value: object, choices: Sequence[object]) -> str:
    """The choice that a wrong value means, or an empty string."""
    texts = [str(choice) for choice in choices]
    known = OTHER_VALUES.get(_plain(str(value)))
    if known is not None:
        return known if known in texts else ""
    if alike := [text for text in texts if _plain(text) == _plain(str(value))]:
        return alike[0]  # BF16, flash_attn
    return next(iter(difflib.get_close_matches(str(value), texts, n=1)), "")


def elsewhere_remedy(value: object, choices: Sequence[object]) -> str:
    """The remedy for a value that means another setting, or an empty string."""
    plain = _plain(str(value))
    if "cuda" in choices and (gpu := re.fullmatch(r"(?:cuda|gpu):?(\d+)", plain)):
        return f"write cuda, and choose the GPU with CUDA_VISIBLE_DEVICES={gpu[1]}"
    return next((remedy for (word, choice), remedy in _ELSEWHERE_VALUES.items()
                 if word == plain and choice in choices), "")  # fmt: skip


def setting_of_argument(argument: str, known: Sequence[str]) -> str:
    """What an argument that is no ``group.field=value`` should be: the whole remedy."""
    plain = in_ascii(argument)
    if is_quoted(argument):
        if argument[-1] not in TYPOGRAPHIC_QUOTES:  # the shell has split it at its blanks
            return f"write '{plain[1:].partition('=')[0]}=...', in the quotes of the keyboard"
        plain = plain[1:-1]
    words = re.split(r"\s*[=:]\s*", plain.strip(), maxsplit=1)
    key, value = words[0].strip("-"), words[1] if len(words) == 2 else ""
    groups = [name for name in known if "." not in name]
    if key in groups:
        example = next(name for name in known if name.startswith(f"{key}."))
        return f"{key} is a group of settings: write them one by one, such as {example}=VALUE"
    if key in known:
        after = "=VALUE, without blanks around the equals sign" if not value else f"={value}"
        return f"write {key}{after}"
    if Path(argument).suffix in (".yaml", ".yml"):
        return "one config file is read, the first that is named: leave this one out, or write its settings"
    if "." not in key.strip(".") and re.fullmatch(r"[\w-]+", key) and key.isascii() and (value or "=" not in plain):
        named = nearest_setting(key, known)
        if value or _plain(named.partition("=")[0].rsplit(".", 1)[-1]) == _plain(key):
            setting, fixed, meant = named.partition("=")
            return f"write {setting}={meant if fixed else value or 'VALUE'}"
    return "see --help for every field"


def config_remedy(path: str) -> str:
    """How to name a config file that is not there under this name."""
    if remedy := unusable_remedy(path):
        return remedy
    if Path(f"{path}.idx").is_file():
        return f"it is a dataset: name the config first, then data.train={path}"
    if "=" in path:
        return "name the YAML file first, then settings: CONFIG.yaml group.field=value"
    if Path(path).is_dir():
        return _folder_remedy(Path(path))
    name = Path(path).name
    for candidate in (f"{path}.yaml", f"{path}.yml", str(PRESETS / name), str(PRESETS / f"{name}.yaml")):
        if Path(candidate).is_file():
            return f"did you mean {_short(candidate)}?"
    folder = Path(path).parent
    here = [str(p) for p in [*folder.glob("*.y*ml"), *PRESETS.glob("*.yaml")]]
    for part in ("name", "stem"):  # as it stands there, and as a preset is called
        close = difflib.get_close_matches(name, [getattr(Path(p), part) for p in here], n=1, cutoff=0.6)
        if close:
            return f"did you mean {_short(next(p for p in here if getattr(Path(p), part) == close[0]))}?"
    return "name an existing YAML file" + (
        f", such as {_short(str(PRESETS / 'tiny.yaml'))}" if PRESETS.is_dir() else ""
    )


def _folder_remedy(folder: Path) -> str:
    """How to name the config that a folder in its place stands for."""
    if configs := sorted(folder.glob("*.y*ml")):
        return f"name a file in it: {', '.join(_short(str(path)) for path in configs[:4])}"
    names = (folder.name, *(path.name for path in folder.iterdir()))
    if any(name in ("checkpoints", "metrics.jsonl") or name.startswith("step-") for name in names):
        run = next((p.parent for p in (folder, *folder.parents) if p.name == "checkpoints"), folder)
        return (
            f"it belongs to a run: to go on with it give the YAML file and the settings that began it, with "
            f"train.output={_short(str(run))}"
        )
    if "config.json" in names:
        return "it is a Hugging Face model: tools/hf_to_checkpoint.py makes a checkpoint of it, and a config"
    return "name a YAML file" + (f", such as {_short(str(PRESETS / 'tiny.yaml'))}" if PRESETS.is_dir() else "")


def foreign_remedy(path: str, tree: object) -> str:
    """What to name in place of a file that is no config, or an empty string."""
    name = Path(path).name
    if name.endswith(_DATASET_ENDINGS):
        return "it is a part of a dataset: name the config first, then data.train=PREFIX"
    if isinstance(tree, dict) and "architectures" in tree:
        return "it is the config of a Hugging Face model: tools/hf_to_checkpoint.py makes a checkpoint of it, and ours"
    if name.lower().endswith(_TEXT_ENDINGS):
        return "it is no config: name a YAML file first, then settings: CONFIG.yaml group.field=value"
    return ""


def sources_remedy(text: str) -> str:
    """The mapping that ``142 P 128 Q`` (Megatron's form, either way round) means, or an empty string.

    A prefix may have blanks in it: without numbers, or where such a dataset is there, it is one.
    """
    if Path(f"{text}.idx").exists():
        return ""
    if _is_mapping(text) or re.search(f"[，、：；｛｝{TYPOGRAPHIC_QUOTES}]", text):  # a name may have them
        return mapping_remedy(text)
    words = re.split(r"[\s,]+", text.strip())
    if len(words) < 2:
        return ""
    pairs = [words[i : i + 2] for i in range(0, len(words), 2)]
    if all(len(p) == 2 and is_number(p[0]) and not is_number(p[1]) for p in pairs):
        return "write {" + ", ".join(f"{prefix}: {weight}" for weight, prefix in pairs) + "}"
    if all(len(p) == 2 and is_number(p[1]) and not is_number(p[0]) for p in pairs):
        return "write {" + ", ".join(f"{prefix}: {weight}" for prefix, weight in pairs) + "}"
    names = [word for word in re.split(r"[\s,]+", text) if word]
    if len(names) > 1 and all(Path(f"{name}.idx").exists() for name in names):
        return "write {" + ", ".join(f"{prefix}: 1" for prefix in names) + "}"
    return ""


def pairs_remedy(mapping: Mapping[object, object], of_weights: bool) -> str:
    """The mapping that ``{a 1}`` or ``{a:1, b: 2}`` means: YAML reads keys without values there."""
    if not of_weights:
        return "write {NAME: PREFIX}, with a colon and a blank"
    if any(given is None and _is_mapping(str(key)) for key, given in mapping.items()):
        return mapping_remedy(
            ", ".join(str(key) if given is None else f"{key}: {given}" for key, given in mapping.items())
        )
    pairs = []
    for key, given in mapping.items():
        prefix, _, weight = str(key).replace(":", " ").rpartition(" ")
        parted = given is None and prefix and is_number(weight)
        pairs.append(f"{prefix.strip()}: {weight}" if parted else f"{key}: {1 if given is None else given}")
    return "write {" + ", ".join(pairs) + "}, with a colon and a blank"


def mapping_remedy(text: str) -> str:
    """The mapping that ``a：1，b：2`` or ``a=1, b=2`` means, in plain characters."""
    pairs = []
    for part in re.split(r",\s*", in_ascii(text).strip(" {}\"'")):
        key, sign, value = re.match(r"(.*?)\s*(?:([=:])\s*([^=:]*))?$", part.strip(" \"'"), re.DOTALL).groups()  # type: ignore[union-attr]
        number = number_meant(value, whole=False) if sign else ""
        pairs.append(f"{key}: {number or value}" if sign else key)
    return "write " + ("{" + ", ".join(pairs) + "}" if len(pairs) > 1 or ":" in pairs[0] else pairs[0])


def _is_mapping(text: str) -> bool:
    """Whether every part has a weight behind ``=`` or ``:``, in whatever characters, as no prefix has."""
    parts = [part for part in re.split(r"[,，、]", text) if part.strip()]
    return bool(parts) and all(re.fullmatch(r".*[=:：＝]\s*[0-9.]+\s*%?[\s}｝]*", part) for part in parts)


def number_remedy(value: object, whole: bool) -> str:
    """The digits that ``1k``, ``1,000`` or ``0.1%`` means."""
    if meant := number_meant(str(value), whole):
        return f"write {meant}"
    return f"write a {'whole ' if whole else ''}number"


def list_remedy(value: object, choices: Sequence[object]) -> str:
    """The list that ``a,b`` or ``a b`` means where a list of choices is wanted, or an empty string."""
    words = re.findall(r"[\w.-]+", in_ascii(str(value)))
    return f"write [{', '.join(words)}]" if len(words) > 1 and set(words) <= set(map(str, choices)) else ""


def bool_remedy(value: object) -> str:
    """true or false, whichever a value such as ``1``, ``'no'`` or ``是`` means."""
    plain = in_ascii(str(value)).strip().lower()
    if plain in ("1", "y", "t", "true", "yes", "on", "是", "真", "开"):
        return "write true"
    return "write false" if plain in ("0", "n", "f", "false", "no", "off", "否", "假", "关") else "write true or false"


_YAML_SLIPS = (
    (re.compile(r"<{7}|={7}$|>{7}"), "is a mark of git: a merge is not finished; keep one of the two versions"),
    (re.compile(r" *\t"), "begins with a tab; YAML takes blanks alone"),
    (re.compile(r"\s*[\w.]+\s*：|[^#]*[｛｝“”，]"), 'has a full-width character; write : , { } and " in ASCII'),
    (re.compile(r"\s*[A-Za-z_]\w*:[^\s/\\:]"), "needs a blank behind its colon"),
    (re.compile(r"\s*[A-Za-z_]\w*\s*=\s*\S"), "has = in it; a file has NAME: VALUE in its lines"),
)
"""How lines begin that do not mean in YAML what their writer had in mind."""


def yaml_remedy(text: str) -> str:
    """Which line of a file that is no config is at fault and how to mend it, or an empty string."""
    for pattern, rule in _YAML_SLIPS:
        for number, line in enumerate(text.splitlines(), 1):
            if pattern.match(line):
                return f"line {number} {rule}"
    return ""


def encoding_remedy(data: bytes) -> str:
    """How to turn the bytes of a file that is no UTF-8 into a config."""
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "save it as UTF-8; it is UTF-16"
    try:
        text = data.decode("gb18030")
    except UnicodeDecodeError:
        return "name a YAML file"
    is_text = not re.search(r"[\x00-\x08\x0e-\x1f]", text)
    return "save it as UTF-8; it looks like GBK (GB18030)" if is_text else "name a YAML file"


def _plain(name: str) -> str:
    return name.replace("-", "").replace("_", "").lower()


def _short(path: str) -> str:
    """Relative to the current folder where it lies below."""
    whole, here = Path(path).resolve(), Path.cwd()
    return str(whole.relative_to(here)) if whole.is_relative_to(here) else str(path)
