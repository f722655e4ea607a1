"""docs/configuration.md, printed from the models of the configuration.

python -m cluster.config_page > docs/configuration.md
"""

import sys
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from cluster.config import ClusterConfig
from cluster.config_file import yaml_scalar

_HEAD = """# Configuration

Printed by `python -m cluster.config_page`; do not edit.

`ellm serve --config cluster.yaml` reads a YAML file with these keys. Every key may be left out. `ellm config example`
prints a file with all of them, `ellm config check FILE` says what does not fit: the line, what was found, what would
fit.

```yaml
models:
  - source: Qwen/Qwen3-0.6B
    replicas: 2
memory: {budget: 4GiB}
http: {port: 8000}
```

- A **size** is a number of bytes, or text such as `512MiB` or `1.5GB`: KiB, MiB, GiB and TiB count in 1024, KB, MB, GB
  and TB in 1000.
- **auto**, or `null`, of a size and of `max_model_len`: the value follows from the model and the machine.
- Values are strict: text is not taken for a number, and an unknown key is an error.
- Paths are taken from where the command runs.

Of a cluster that runs, `ellm models add`, `remove` and `limit` change the models ([how](models.md)); the rest needs a
new start.
"""
_UNITS = {
    "_bytes": "bytes",
    "_ms": "milliseconds",
    "_tokens_per_s": "tokens a second",
    "_s": "seconds",
    "_tokens": "tokens",
    "_len": "tokens",
    "token_budget_max": "tokens",
    "_seqs": "requests",
    "_requests": "requests",
    "active_max": "requests",
    "_sequences": "answers",
}
"""By the ending of a key: the first that fits."""
_KINDS = {
    "integer": "whole number",
    "number": "number",
    "string": "text",
    "boolean": "true or false",
    "object": "keys",
}
_BOUNDS = {
    "minimum": "at least {}",
    "exclusiveMinimum": "above {}",
    "maximum": "at most {}",
    "maxLength": "at most {} characters",
    "pattern": "`{}`",
}


def config_page() -> str:
    """The page as Markdown."""
    return _HEAD + "".join(_section(ClusterConfig, ""))


def _section(section: type[BaseModel], path: str) -> Iterator[str]:
    """The keys of ``section``, which stands at the dotted ``path``, and then the sections in it."""
    depth = 2 + path.count(".")
    yield f"\n{'#' * depth} {path or 'The file'}\n\n{_plain(section.__doc__)}\n\n"
    yield "| key | type, unit | default | |\n|---|---|---|---|\n"
    schemas = section.model_json_schema()["properties"]
    within = {}
    for name, field in section.model_fields.items():
        at = f"{path}.{name}".removeprefix(".")
        if (below := _model_of(field.annotation)) is not None:
            within[at] = below
            kind = f"[{'list of ' if _is_list(field.annotation) else ''}keys](#{at.replace('.', '')})"
            default = ""
        else:
            kind, default = _kind(name, schemas[name]), f"`{_default(field)}`"
        yield f"| `{name}` | {kind} | {default} | {_plain(field.description)} |\n"
    if rules := [_plain(rule.func.__doc__) for rule in _after_validators(section)]:
        yield "\n" + "".join(f"- {rule}\n" for rule in rules)
    for at, below in within.items():
        yield from _section(below, at)


def _after_validators(section: type[BaseModel]) -> list[Any]:
    validators = section.__pydantic_decorators__.model_validators.values()
    return [one for one in validators if one.info.mode == "after"]


def _model_of(annotation: Any) -> type[BaseModel] | None:
    """The section that a key holds, alone or in a list."""
    one = get_args(annotation)[0] if _is_list(annotation) else annotation
    return one if isinstance(one, type) and issubclass(one, BaseModel) else None


def _is_list(annotation: Any) -> bool:
    return getattr(annotation, "__origin__", None) is list


def _default(field: FieldInfo) -> str:
    return yaml_scalar(field.get_default(call_default_factory=True), field.description or "")


def _kind(name: str, schema: Mapping[str, Any]) -> str:
    """What the key takes, from its JSON schema."""
    wanted = [one for one in schema.get("anyOf", [schema]) if one.get("type") != "null"]
    nothing = "" if len(wanted) == len(schema.get("anyOf", [schema])) else "auto" if len(wanted) > 1 else "null"
    first = wanted[0]
    if {"type": "string"} in wanted[1:]:
        return "size, or auto"
    if "const" in first:
        return f"`{first['const']}` only"
    if "enum" in first:
        return ", ".join(f"`{value}`" for value in first["enum"])
    unit = next((f" ({unit})" for ending, unit in _UNITS.items() if name.endswith(ending)), "")
    bounds = [words.format(_number(first[key])) for key, words in _BOUNDS.items() if key in first]
    kind = ", ".join([_KINDS[first["type"]] + unit, *bounds])
    return f"{kind}, or {nothing}" if nothing else kind


def _number(bound: object) -> str:
    return f"{bound:.10g}" if isinstance(bound, float) else str(bound)


def _plain(text: str | None) -> str:
    """On one line, as Markdown takes it in a table."""
    return " ".join((text or "").split()).replace("|", "\\|").replace("*", "\\*")


if __name__ == "__main__":
    sys.stdout.write(config_page())
