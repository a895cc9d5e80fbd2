"""A chat with a model on the terminal: it keeps the conversation, streams the answers, and knows a few commands.

A tokenizer with a chat template gets the turns as messages. The tokenizer of a base model has no template: the model
continues one text, the lines of both sides one after the other, and the chat says so at its start. What no longer fits
into the model's context beside the next answer is left out from the front, and a note says so. Needs no torch until it
is called.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from megatron_hammer.base.characters import in_ascii
from megatron_hammer.base.errors import ConfigError, DataError
from megatron_hammer.base.line_input import ReadLine
from megatron_hammer.huggingface.generate import Sampling, continuation_of, continue_rows, seed_everything
from megatron_hammer.huggingface.text_model import Message, TextModel

Write = Callable[[str], None]

COMMANDS = {
    "/help": "show these commands",
    "/new": "forget what was said",
    "/undo": "take the last line and its answer back",
    "/again": "another answer to the last line",
    "/show": "show what was said so far",
    "/quit": "end (as Ctrl-D does); Ctrl-C ends an answer",
}
"""A line that begins with ``//`` is said with one of the two."""


@dataclass
class Chat:
    """The turns so far, and the next one.

    Args:
        system: what a chat template gets as the system's message; what the text of a base model begins with.
    """

    model: TextModel
    sampling: Sampling
    system: str = ""
    turns: list[Message] = field(default_factory=list)
    """User and assistant, in turn."""

    def __post_init__(self) -> None:
        self.sampling.check()
        context = self.model.context
        if context is not None and self.sampling.max_new_tokens >= context:
            what, rule = f"--max-new-tokens={self.sampling.max_new_tokens}", "leaves no room for what is said"
            raise ConfigError(45, what, rule, f"use less than the model's context of {context} tokens")
        seed_everything(self.sampling.seed)

    def introduction(self) -> list[str]:
        """What this model can do here, in lines for people."""
        if self.model.template is None:
            lines = [
                "This is a base model: its tokenizer has no chat template, so it was not taught to answer.",
                "It goes on with the text of what you and it have written so far; an empty line lets it write on.",
            ]
        else:
            lines = ["The tokenizer's chat template tells the model who says what."]
        return [*lines, f"{self.model.start_words}. /help shows the commands."]

    def answer(self, said: str, write: Write, note: Write) -> None:
        """Add what the user says, and the model's answer as it comes; Ctrl-C ends the answer, and it stays so far.

        Raises:
            ConfigError: E246 nothing was said, and there is nothing that a text could begin with.
        """
        self.turns.append({"role": "user", "content": said})
        pieces: list[str] = []

        def show(piece: str) -> None:
            pieces.append(piece)
            write(piece)

        try:
            row = self._ids(note)
            new = continue_rows(self.model, [row], self.sampling, show)[0]
            text = continuation_of(self.model, "", row, new).text
        except KeyboardInterrupt:
            text = "".join(pieces)
        except BaseException:
            del self.turns[-1]
            raise
        write("\n")
        self.turns.append({"role": "assistant", "content": text})

    def undo(self) -> str | None:
        """Take the last line and its answer back; the line, or None where nothing was said."""
        if not self.turns:
            return None
        said = self.turns[-2]["content"]
        del self.turns[-2:]
        return said

    def text(self) -> str:
        """All of it as one text, as a base model reads it: each line of the user begins a new one."""
        parts = [self.system] if self.system else []
        for turn in self.turns:
            if turn["role"] == "user" and turn["content"] and parts:
                parts.append("\n")
            parts.append(turn["content"])
        return "".join(parts)

    def _ids(self, note: Write) -> list[int]:
        """The prompt of the next answer, as long as the context allows."""
        room = None if self.model.context is None else self.model.context - self.sampling.max_new_tokens
        if self.model.template is None:
            ids = self.model.encode(self.text())
            start = list(self.model.start) or (list(self.model.boundary) if not ids else [])
            if not start and not ids:
                rule = "was said, and the tokenizer has neither bos nor eos to begin with"
                raise ConfigError(46, "nothing", rule, "write something")
            if room is not None and len(start) + len(ids) > room:
                note(f"note: the first {len(start) + len(ids) - room} tokens no longer fit and are left out")
                return [*start, *ids[len(ids) - max(room - len(start), 0) :]]
            return [*start, *ids]
        system: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        for first in range(0, len(self.turns), 2):
            ids = self.model.template([*system, *self.turns[first:]])
            if room is None or len(ids) <= room:
                break
        else:
            note("note: this alone is longer than the model's context")
        if first:
            note(f"note: the first {first // 2} lines and their answers no longer fit and are left out")
        return ids


def converse(chat: Chat, read: ReadLine, write: Write, note: Write) -> None:
    """Read lines, and answer them, until the input ends.

    Args:
        note: gets what is not part of the conversation, line by line.
    """
    for line in chat.introduction():
        note(line)
    while True:
        try:
            said = read("> ")
        except EOFError:
            return
        except KeyboardInterrupt:
            note("/quit or Ctrl-D ends")
            continue
        except UnicodeDecodeError as error:
            note(f"this line is not text in {error.encoding}: {error.reason}")
            continue
        said = _as_typed_in_ascii(said)
        if said.startswith("/") and not said.startswith("//"):
            if said.strip() == "/quit":
                return
            again = _obey(chat, said.strip(), note)
            if again is None:
                continue
            said = again
        elif said.startswith("//"):
            said = said[1:]
        try:
            chat.answer(said, write, note)
        except (ConfigError, DataError) as error:  # of this line: half a surrogate pair, nothing to begin with
            note(str(error))


def _as_typed_in_ascii(said: str) -> str:
    """The command that ``／help`` or ``、help`` means, as a Chinese keyboard writes it; any other line as it is."""
    meant = "/" + in_ascii(said[1:]).strip()
    return meant if said[:1] in ("／", "、") and meant in COMMANDS else said


def _obey(chat: Chat, command: str, note: Write) -> str | None:
    """Do what a command says; a line that is to be answered (again), or None."""
    if command == "/again":
        said = chat.undo()
        if said is None:
            note("nothing was said yet")
        return said
    if command == "/new":
        chat.turns.clear()
        note("what was said is forgotten")
    elif command == "/undo":
        said = chat.undo()
        note("nothing was said yet" if said is None else f"taken back: {said}")
    elif command == "/show":
        note(chat.text() or "nothing was said yet")
    elif command == "/help":
        for name, what in COMMANDS.items():
            note(f"{name:8}{what}")
    else:
        note(f"{command} is no command; /help shows them, and //... says a line that begins with /")
    return None
