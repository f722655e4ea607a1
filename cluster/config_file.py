"""Reading the configuration from YAML, and writing a commented example of it.

Every wrong key, type or value is reported at once, each with its line, its dotted path, what was found and what would
fit.
"""

import difflib
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from cluster.config import ClusterConfig
from memory_agent.errors import SettingsError

_EXAMPLE_WIDTH = 100


class ConfigError(SettingsError):
    """The configuration file cannot be read or says something that does not fit. One line a problem."""


def load_config(path: Path) -> ClusterConfig:
    """The configuration in the file ``path``. Raises ConfigError."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(f"no such file: {path}; `ellm config example > {path}` writes one to start from") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    return parse_config(text, str(path))


def parse_config(text: str, origin: str) -> ClusterConfig:
    """The configuration in ``text``; ``origin`` names it in errors. Raises ConfigError."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is None:
            return ClusterConfig()
        problems = list(_repeated_keys(root))
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{origin} is not YAML: {error}") from error
    if problems:
        raise ConfigError(f"{origin}:\n" + "\n".join(f"  {problem}" for problem in problems))
    if not isinstance(data, dict):
        raise ConfigError(f"{origin} should hold keys such as models: and memory:, found {_shown(data)}")
    return validated(data, origin, root)


def validated(tree: dict[str, Any], origin: str, root: yaml.Node | None = None) -> ClusterConfig:
    """The configuration with the values of ``tree``; ``root`` gives errors their line. Raises ConfigError."""
    try:
        return ClusterConfig.model_validate(tree)
    except ValidationError as error:
        lines = [_explain(item, root) for item in error.errors(include_url=False)]
        raise ConfigError(f"{origin} does not fit:\n" + "\n".join(f"  {line}" for line in lines)) from error


def example_config() -> str:
    """A commented YAML document with every key at its default."""
    heading = (
        "Configuration of a cluster, for `ellm serve --config FILE`. Every key may be left out; what stands here is "
        "the default."
    )
    return "\n".join([*_comment(heading, ""), "", *_example(ClusterConfig(), "")])


def _explain(item: ErrorDetails, root: yaml.Node | None) -> str:
    where = (_dotted(item["loc"]) or "the whole") + (f" (line {_line(root, item['loc'])})" if root else "")
    if item["type"] == "extra_forbidden":
        keys = list(_section_at(item["loc"][:-1]).model_fields)
        close = difflib.get_close_matches(str(item["loc"][-1]), keys, n=1)
        meant = f"did you mean {close[0]!r}? " if close else ""
        return f"{where}: unknown key; {meant}Keys here: {', '.join(keys)}"
    wish = (
        item["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ").replace("Input should", "should")
    )
    if isinstance(item["input"], BaseModel | dict) and item["type"] == "value_error":
        return f"{where}: {wish}"
    return f"{where}: found {_shown(item['input'])}; {wish}"


def _shown(value: object) -> str:
    kinds = {
        str: "text",
        bool: "a truth value",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "keys",
        type(None): "nothing",
    }
    kind = kinds.get(type(value), type(value).__name__)
    return kind if value is None else f"{textwrap.shorten(repr(value), 60)} ({kind})"


def _dotted(loc: Sequence[int | str]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).removeprefix(".")


def _line(node: yaml.Node, loc: Sequence[int | str]) -> int:
    """Line of the deepest part of ``loc`` that the document has, from 1."""
    line = node.start_mark.line
    for part in loc:
        if isinstance(node, yaml.MappingNode):
            found = next(((k, v) for k, v in node.value if k.value == str(part)), None)
            if found is None:
                break
            line, node = found[0].start_mark.line, found[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int):
            node = node.value[part]
            line = node.start_mark.line
    return int(line) + 1


def _repeated_keys(root: yaml.Node) -> Iterator[str]:
    waiting: list[tuple[yaml.Node, tuple[int | str, ...]]] = [(root, ())]
    visited = set()  # an alias can lead back to where it stands
    while waiting:
        node, loc = waiting.pop()
        if id(node) in visited:
            continue
        visited.add(id(node))
        if isinstance(node, yaml.MappingNode):
            keys = [str(key.value) for key, _ in node.value]
            for (key, value), name in zip(node.value, keys, strict=True):
                if keys.count(name) > 1:
                    line = key.start_mark.line + 1
                    yield f"{_dotted((*loc, name))} (line {line}): the key is there twice; remove one"
                waiting.append((value, (*loc, name)))
        elif isinstance(node, yaml.SequenceNode):
            waiting += [(value, (*loc, index)) for index, value in enumerate(node.value)]


def _section_at(loc: Sequence[int | str]) -> type[BaseModel]:
    """The model whose keys stand at ``loc``: found by walking the defaults, in which every section appears."""
    here: Any = ClusterConfig()
    for part in loc:
        here = here[0] if isinstance(part, int) else getattr(here, part)
    return type(here)


def _example(section: BaseModel, indent: str) -> Iterator[str]:
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        yield from _comment(field.description or "", indent)
        if isinstance(value, BaseModel):
            yield f"{indent}{name}:"
            yield from _example(value, indent + "  ")
        elif isinstance(value, list):
            yield f"{indent}{name}:"
            for entry in value:
                yield from _entry(list(_example(entry, indent + "    ")), indent + "  ")
        else:
            yield f"{indent}{name}: {yaml_scalar(value, field.description or '')}"
        if not indent:
            yield ""


def _entry(lines: list[str], indent: str) -> Iterator[str]:
    """The lines of a section as one entry of a list: the dash goes to the first key, below that key's comment."""
    first = next(index for index, line in enumerate(lines) if not line.lstrip().startswith("#"))
    yield from (line.removeprefix("  ") for line in lines[:first])
    yield f"{indent}- {lines[first].strip()}"
    yield from lines[first + 1 :]


def yaml_scalar(value: object, description: str) -> str:
    """``value`` as it stands in a file; ``description``, of its key, says whether None is auto there."""
    if value is None and "auto:" in description:
        return "auto"
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("\n...\n").strip()


def _comment(text: str, indent: str) -> list[str]:
    return textwrap.wrap(
        " ".join(text.split()), _EXAMPLE_WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# "
    )
