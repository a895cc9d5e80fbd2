"""A YAML loader with limits; a module of its own, so that a Python without PyYAML can print ``--help`` all the same."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import yaml

from megatron_hammer.base.reading import MAX_DIGITS

_MAX_VALUES = 10_000
"""Keys and values, each alias counted as what it stands for: 5,000 sources. PyYAML takes 80 us for one."""
_MAX_DEPTH = 20
"""Groups in groups; settings have three."""


class StrictLoader(yaml.SafeLoader):
    """PyYAML's safe loader, with limits for what a hostile text could make of itself, and one more rule.

    A key given twice is an error instead of a silent loss of the first. A few lines of aliases can stand for billions
    of values: they are counted where they are used.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._values = self._depth = 0
        self._sizes: dict[str, int] = {}  # of what an anchor names, in values, once it is complete

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """As PyYAML does, counting."""
        event = self.peek_event()  # type: ignore[no-untyped-call]
        before, anchor = self._values, event.anchor
        is_alias = isinstance(event, yaml.AliasEvent)
        if is_alias and anchor in self.anchors and anchor not in self._sizes:
            raise self._refusal(f"*{anchor} stands inside of what it names", event)
        self._values += self._sizes.get(anchor, 1) if is_alias else 1
        self._depth += 1
        if self._values > _MAX_VALUES:
            raise self._refusal(f"it has more than {_MAX_VALUES:,} values, aliases written out", event)
        if self._depth > _MAX_DEPTH:
            raise self._refusal(f"it is nested more than {_MAX_DEPTH} deep", event)
        node: yaml.Node | None = super().compose_node(parent, index)  # type: ignore[no-untyped-call]
        self._depth -= 1
        if anchor is not None and not is_alias:
            self._sizes[anchor] = self._values - before
        return node

    @staticmethod
    def _refusal(rule: str, event: yaml.Event) -> yaml.YAMLError:
        mark: Any = event.start_mark
        return yaml.composer.ComposerError(None, None, rule, mark)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """A whole number, of a length that can be written out again."""
        if len(node.value) > MAX_DIGITS:
            raise yaml.constructor.ConstructorError(None, None, "a number has too many digits", node.start_mark)
        number: int = super().construct_yaml_int(node)  # type: ignore[no-untyped-call]
        return number

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping whose keys are all different."""
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                continue  # PyYAML says so
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


StrictLoader.add_constructor("tag:yaml.org,2002:int", StrictLoader.construct_yaml_int)
