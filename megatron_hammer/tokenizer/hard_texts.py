"""Texts that tokenizers find hard: a conversion's proof tries them, and fuzzing (``lab/fuzz.py``) starts from them.

FIXED_TEXTS    what has gone wrong somewhere before: always tried, and first
noise          random characters of small alphabets, where merges compete
join_pieces    pieces of a vocabulary glued at random, where one piece ends inside another
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from megatron_hammer.tokenizer.pieces import SPACE

FIXED_TEXTS = (
    "",
    "Hello, world! It's 3.14 o'clock (approximately); isn't it?",
    "今天天气很好，我们去公园散步吧。",
    "训练一个语言模型，需要高质量的中文、英文和代码语料！",
    "臺灣的傳統文化與繁體字：龍、鳳、龜、鬱鬱蔥蔥。",
    "𠀀𠮷𡃁 㐀䶿 生僻字：彧翀翾甯",
    "1234567890 ١٢٣ ①②③ 一二三 0x1F 1e-5 ½",
    "def f(x: int) -> int:\n    if x > 0:\n        return x ** 2  # 平方\n    return -x\n",
    "#include <stdio.h>\r\nint main(void) {\r\n\tprintf(\"%d\\n\", 42);\r\n\treturn 0;\r\n}\r\n",
    "for (;;) { a[i++] = b[--j] ?? c?.d; }  // --- <!-- x --> ---",
    "\t\tif\tx:\n\t\t\tpass\n\n\n\n",
    "a b  c   d    e     f      g",
    " leading", "  two leading", "trailing ", "trailing   ", " ", "  ", " " * 17, " " * 100, "\n", "\n\n \n  \n",
    "]   (", "x =   y;      z", "    \n    \n", "\r", "\r\n\r\n",
    "\u3000全角空格\u3000\u3000", "no\u00a0break\u2003em\u200bzero",
    "😀😃 👨\u200d👩\u200d👧\u200d👦 👍🏽 🇨🇳🇺🇸 ☃️ ✂︎",
    "e\u0301 é Å Å ñ ﬁ Ⅷ ㎏ ｆｕｌｌ ﷺ",
    "مرحبا بالعالم שלום עולם", "สวัสดีชาวโลก नमस्ते दुनिया",
    "Привет, мир! Γειά σου", "こんにちは、カタカナ 한국어",
    "".join(map(chr, range(1, 32))) + "\x7f", "\0", "a\0b", "\0\0\0", " \0 ", "\x80\x9f\xa0\xad",
    "<s>", "</s>", "<s>text</s>", "a<s> </s>b", "<unk>", "<pad>", "<s", "s>", "<<s>>", "<s><s>", " <s> ",
    "<0x41>", "<0x0A><0x00>", "<|endoftext|>", "<|im_start|>user\n你好<|im_end|>", "[INST] x [/INST]", "<unused_354>",
    "<strong>bold</strong><br/>", "<stro", "<p></p ><p/>", "---", "----", "<!--", "<!-", "...", "?!?!",
    SPACE, SPACE * 3, f"a{SPACE}b", f" {SPACE} ", f"{SPACE}a {SPACE}{SPACE}  b", f"\n{SPACE}",
    "\ue000\uf8ff\U000f0000", "\ufffd\ufffe\uffff", "\ufeffbom", "\u2585\u2047", "\U0010ffff\u0378",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "哈哈哈哈哈哈哈哈哈哈", "=" * 79, "-=" * 40, "的" * 300, "ab" * 500,
)  # fmt: skip

NOISE_ALPHABETS = (
    " \n\t\r" + SPACE, "ab ", "<s>/unk0x41|", "".join(map(chr, range(128))), "0123456789.?!-", "的一是了我不人在他有",
    "\0\x01\x7f\x80\u2028\ufeff\ufffd", "😀👍🏽\u200d️🇨🇳", "（）《》“”‘’，。！？、；：…—", "龘靐齉爩鱻麤𠀀𪚥",
)  # fmt: skip


def noise(generator: random.Random) -> str:
    """Characters of one small alphabet, some of another."""
    alphabet = generator.choice(NOISE_ALPHABETS)
    other = generator.choice(NOISE_ALPHABETS)
    return "".join(
        generator.choice(alphabet if generator.random() < 0.8 else other) for _ in range(generator.randint(1, 60))
    )


def join_pieces(generator: random.Random, pieces: Sequence[str]) -> str:
    """A few pieces side by side, perhaps after a space or two."""
    return generator.choice(("", " ", "  ")) + "".join(generator.choices(pieces, k=generator.randint(2, 6)))
