"""Many random texts that tokenizers find hard, and bytes that are no text: for comparing tokenizers (``verify.py``).

    fuzz_texts     the fixed hard texts, then sentences, code, emoji, literal special tokens, symbols, broken prefixes
    break_utf8     bytes that are no text any more, for encoders that take bytes

Both are functions of a seed: a difference that was found once is found again. The fixed texts and the glued pieces are
those of ``tokenizer/hard_texts.py``.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from functools import cache

from megatron_hammer.tokenizer.hard_texts import FIXED_TEXTS, join_pieces, noise
from megatron_hammer.tokenizer.pieces import SPACE

_ENGLISH = (
    "the", "of", "and", "to", "in", "a", "is", "that", "for", "it", "as", "was", "with", "be", "by", "on", "not", "he",
    "his", "but", "at", "are", "this", "have", "from", "or", "had", "an", "they", "which", "one", "you", "were", "all",
    "her", "she", "there", "would", "their", "we", "him", "been", "has", "when", "who", "will", "no", "more", "if",
    "out", "so", "up", "said", "what", "its", "about", "than", "into", "them", "can", "only", "other", "time", "new",
    "some", "could", "these", "two", "may", "first", "then", "do", "any", "like", "my", "now", "over", "such", "our",
    "man", "tokenizer", "isn't", "don't", "I'm", "U.S.", "e.g.", "3.14", "1,000", "naïve", "café", "rock-n-roll",
    "O'Neil", "https://example.org/a?b=c&d=%20",
)  # fmt: skip
_CODE = (
    "def f(x, *, y=None):", "\n    return", "\n\t\tif (x >= y) {", "}\r\n", "self.__init__()", "std::vector<int>", "=>",
    "// ---", "/* x */", "#include", "a[i][j] += 1;", "f\"{x!r}\"", "\\n\\t\\x00", "0xDEADBEEF", "<div class='a'>",
    "</div>", "&&", "||", "->", "==", "!=", "lambda x: x**2", "SELECT * FROM t;", "$HOME/.ssh",
    "{\"k\": [1, 2.5e-3, null]}", "\\frac{a}{b}",
)  # fmt: skip
_EMOJI = (
    "😀", "😃", "👍🏽", "👨\u200d👩\u200d👧\u200d👦", "🇨🇳", "🇺🇸", "☃️", "✂︎", "🏴\U000e0067\U000e0062\U000e007f",
    "\u200d", "\ufe0f", "❤", "🀄", "1️⃣",
)  # fmt: skip
_SPECIAL = (
    "<s>", "</s>", "<unk>", "<pad>", "<0x00>", "<0x41>", "<0xE4>", "<|endoftext|>", "<|im_start|>", "[INST]", "[CLS]",
    "<mask>", "<bos>", "<eos>",
)  # fmt: skip
_SPACES = (
    " ", "  ", "\n", "\t", "\r\n", "\u3000", "\u00a0", "\u2003", "\u2028", "\u200b", SPACE, SPACE * 2, f" {SPACE} ",
)  # fmt: skip
_BROKEN = (  # a stray byte, one that never occurs, an overlong NUL, half a surrogate, beyond Unicode, cut characters
    b"\x80", b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xe4\xbd", b"\xf0\x9f\x98",
)  # fmt: skip


def fuzz_texts(
    count: int, seed: int, pieces: Sequence[str] = (), symbols: Sequence[str] = (), specials: Sequence[str] = ()
) -> Iterator[str]:
    """``count`` texts, the fixed ones first: the same for the same arguments.

    Args:
        pieces: of the vocabularies, as text, to be glued at random.
        symbols: user-defined symbols and other added tokens; they, their beginnings and near misses are woven in.
        specials: names of control pieces, written out as text.
    """
    yield from itertools.islice(FIXED_TEXTS, count)
    generator = random.Random(seed)
    specials = (*_SPECIAL, *specials)
    for _ in range(count - len(FIXED_TEXTS)):
        kind = generator.random()
        if kind < 0.15:
            yield noise(generator)
        elif kind < 0.45 and pieces:
            yield join_pieces(generator, pieces)
        else:
            parts = (_part(generator, pieces, symbols, specials) for _ in range(generator.randint(1, 8)))
            yield "".join(parts)


def break_utf8(text: str, generator: random.Random) -> bytes:
    """The text's bytes with one to three faults, some with a byte missing besides; never valid UTF-8."""
    broken = bytearray(text.encode())
    for _ in range(generator.randint(1, 3)):
        at = generator.randint(0, len(broken))
        if generator.random() < 0.3:
            del broken[at : at + 1]
        broken[at:at] = generator.choice(_BROKEN)
    try:
        broken.decode()
    except UnicodeDecodeError:
        return bytes(broken)
    return bytes(broken) + b"\xff"  # two faults made a character


def _part(generator: random.Random, pieces: Sequence[str], symbols: Sequence[str], specials: Sequence[str]) -> str:
    """One stretch of one kind of text."""
    choose, choices, number = generator.choice, generator.choices, generator.randint
    match generator.randrange(13):
        case 0 | 1:
            return "".join(choices(_han("gb2312"), k=number(1, 12))) + choose(("", "，", "。", "："))
        case 2:
            return "".join(choices(_han("big5"), k=number(1, 12))) + choose(("", "，", "。", "」"))
        case 3 | 4:
            words = " ".join(choices(_ENGLISH, k=number(1, 8)))
            return choose((words, words.capitalize(), words.upper(), f" {words}.", f"{words} "))
        case 5:
            return choose(("", " ")).join(choices(_CODE, k=number(1, 4)))
        case 6:
            return "".join(choices(_EMOJI, k=number(1, 4)))
        case 7:
            # The second is longer than any piece of spaces.
            return choose((choose(_SPACES) * number(1, 5), " " * number(1, 80)))
        case 8:
            return "".join(chr(number(0, 0x9F)) for _ in range(number(1, 8)))
        case 9:
            return choose(specials)
        case 10:
            fixed = choose(FIXED_TEXTS)
            return fixed[number(0, len(fixed)) :][:40]
        case 11 if symbols:
            return _broken(choose(symbols), choose(symbols), generator)
        case 12 if pieces:
            return choose(pieces)
    return chr(choose((0, 0x2581, number(0, 0xD7FF), number(0xE000, 0x10FFFF))))


def _broken(symbol: str, other: str, generator: random.Random) -> str:
    """A symbol whole, cut short, run into another one, or with a character in its middle."""
    cut = generator.randint(0, len(symbol))
    return generator.choice(
        (symbol, symbol[:cut], symbol[cut:], symbol[:cut] + other, symbol[:cut] + " " + symbol[cut:], symbol + other)
    )


@cache
def _han(encoding: str) -> str:
    """The Han characters of an older character set: GB 2312 holds simplified ones, Big5 traditional ones."""
    characters = (
        bytes(pair).decode(encoding, "ignore") for pair in itertools.product(range(0xA1, 0xFF), range(0x40, 0xFF))
    )
    return "".join(c for c in characters if len(c) == 1 and "\u4e00" <= c <= "\u9fff")
