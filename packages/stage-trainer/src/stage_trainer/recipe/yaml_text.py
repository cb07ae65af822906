"""Parses a recipe's YAML: safely, with numbers and dates as people write them, and without dropping anything."""

from __future__ import annotations

import re
from typing import Any

import yaml

from stage_trainer.errors import UserError

LONGEST = 2**18
"""The most bytes of a recipe: PyYAML needs a second for a fifth of that, and the longest of ours has 15,000."""
_LARGEST = 100_000
"""The most values of a recipe, counting what anchors repeat."""
_TAGS = {"!ours"} | {
    f"tag:yaml.org,2002:{kind}" for kind in ("map", "seq", "str", "int", "float", "bool", "null", "merge")
}
"""Other tags make values that no key takes, or that would be converted: a set, without order, to a list."""


class Ours:
    """A value with the tag `!ours`."""

    def __init__(self, value: object):
        self.value = value


def parse(text: str, what: str) -> Any:
    """The value of a YAML text; a value tagged `!ours` becomes an `Ours`.

    Args:
        what: the text's name in messages.

    Raises:
        UserError: it is not YAML, has a key twice, an anchor that contains itself, or a value that cannot be read.
    """
    if len(text) > LONGEST:
        raise UserError(f"{what} has more than {LONGEST:,} characters; a recipe has some thousand")
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            if _size(node, {}, set()) > _LARGEST:
                raise UserError(
                    f"{what} has more than {_LARGEST:,} values, by anchors within anchors; write it plainly"
                )
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise UserError(f"{what} is not valid YAML: {error}") from error
    except RecursionError as error:
        raise UserError(f"{what} is nested too deeply; a recipe has a handful of levels") from error
    except UserError:
        raise
    # What PyYAML's own constructors raise for `!!int x`, a number of 5,000 digits and the like.
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(
            f"{what} is not valid YAML: a value that cannot be read ({str(error).partition(';')[0]})"
        ) from error


class _Loader(yaml.SafeLoader):
    """Safe YAML that also reads 2e-4 as a number (YAML 1.1 wants 2.0e-4), leaves dates as text, and knows `!ours`."""


def _construct_ours(loader: yaml.SafeLoader, node: yaml.Node) -> Ours:
    if isinstance(node, yaml.ScalarNode):
        resolve: Any = loader.resolve  # untyped in types-PyYAML
        tag = resolve(yaml.ScalarNode, node.value, (True, False))
        return Ours(loader.construct_object(yaml.ScalarNode(tag, node.value)))
    if isinstance(node, yaml.MappingNode):
        return Ours(loader.construct_mapping(node, deep=True))
    assert isinstance(node, yaml.SequenceNode)
    return Ours(loader.construct_sequence(node, deep=True))


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_constructor("!ours", _construct_ours)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _size(node: yaml.Node, sizes: dict[int, int], inside: set[int]) -> int:
    """Values below a node; an anchor's count as often as they are used."""
    if id(node) in inside:
        raise yaml.constructor.ConstructorError(None, None, "an anchor that holds itself", node.start_mark)
    if node.tag not in _TAGS:
        shown = node.tag.replace("tag:yaml.org,2002:", "!!")
        raise yaml.constructor.ConstructorError(None, None, f"a recipe has no tag {shown}", node.start_mark)
    if id(node) not in sizes:
        inside.add(id(node))
        children: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            _check_keys(node)
            children = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            children = node.value
        sizes[id(node)] = 1 + sum(_size(child, sizes, inside) for child in children)
        inside.remove(id(node))
    return sizes[id(node)]


def _check_keys(node: yaml.MappingNode) -> None:
    """Refuses equal keys, of which PyYAML would silently take the last."""
    seen = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
            continue
        if (key.tag, key.value) in seen:
            raise yaml.constructor.ConstructorError(
                "in a mapping", node.start_mark, f"the key {key.value!r} appears twice", key.start_mark
            )
        seen.add((key.tag, key.value))
