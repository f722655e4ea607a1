"""docs/cli.md, printed from the commands.

python -m cluster.cli_page > docs/cli.md
"""

import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import typer
from typer.models import ArgumentInfo, OptionInfo

from cluster.cli import app

_HEAD = """# Commands

Printed by `python -m cluster.cli_page`; do not edit. `ellm COMMAND --help` says the same.

- **JSON.** Every command has `--json`: standard output is JSON alone then, and what is said on the way goes to
  standard error. `ellm bench`, `simulate` and `plan` take a file for it, or `-` for standard output.
- **Exit status.** 0: done. 1: it could not be done, and standard error says why and what would work. 2: the command
  line is wrong; of `ellm doctor`, the configuration.
- **Completion.** `ellm --install-completion` makes the shell complete commands and options (bash, zsh, fish);
  `ellm --show-completion` prints the script.

| variable | what |
|---|---|
| `ELLM_API_KEY` | the API key that commands show to the cluster ([security](security.md#keys)) |
| `ELLM_API_KEY_FILE` | a file that has it instead; not for `ellm bench` |
| `ELLM_KEYS_FILE` | the keys file of `ellm keys` |
| `SSL_CERT_FILE` | authorities of certificates that the system does not know |
| `ELLM_CACHE` | folder of the default model and of the logs of the last failed start; `~/.cache/ellm` without it |
| `HF_TOKEN` | the hub's token, for gated and private models |
| `CUDA_VISIBLE_DEVICES` | the first GPU in it is the cluster's |
"""
_KINDS = {str: "TEXT", int: "INTEGER", float: "NUMBER", Path: "PATH"}
"""What stands for a value."""


def cli_page() -> str:
    """The page as Markdown."""
    commands = sorted(_commands(app, "ellm"), key=lambda one: one[0])
    return _HEAD + "".join(part for name, callback in commands for part in _command(name, callback))


def _commands(group: typer.Typer, path: str) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Every command below, by what is typed."""
    for command in group.registered_commands:
        assert command.callback is not None
        yield f"{path} {command.name or command.callback.__name__.replace('_', '-')}", command.callback
    for below in group.registered_groups:
        assert below.typer_instance is not None
        yield from _commands(below.typer_instance, f"{path} {below.name}")


def _command(name: str, callback: Callable[..., Any]) -> Iterator[str]:
    rows, arguments = [], []
    for parameter in inspect.signature(callback).parameters.values():
        kind, info = get_args(parameter.annotation)
        if isinstance(info, ArgumentInfo):
            shown = info.metavar or parameter.name.upper()
            arguments.append(shown)
        else:
            shown = _option(parameter.name, _without_none(kind), info)
        rows.append(f"| `{shown}` | {_help(info)} | {_default(parameter, info)} |\n")
    yield f"\n## {name}\n\n{_plain(callback.__doc__)}\n\n"
    yield f"```\n{' '.join([name, *arguments, '[OPTIONS]'])}\n```\n\n| | | default |\n|---|---|---|\n"
    yield from rows


def _option(name: str, kind: Any, info: OptionInfo) -> str:
    plain = name.replace("_", "-")
    # In an annotation the first flag stands where the default is otherwise.
    flags = ", ".join(flag for flag in (info.default, *(info.param_decls or ())) if isinstance(flag, str))
    if kind is bool:
        return flags or f"--{plain} / --no-{plain}"
    return f"{flags or f'--{plain}'} {info.metavar or _metavar(kind)}"


def _metavar(kind: Any) -> str:
    if get_origin(kind) is list:
        (kind,) = get_args(kind)
    if kind in _KINDS:
        return _KINDS[kind]
    words = get_args(kind) if get_origin(kind) is Literal else kind
    return f"{{{','.join(words)}}}"


def _without_none(kind: Any) -> Any:
    parts = get_args(kind)
    return next(one for one in parts if one is not type(None)) if type(None) in parts else kind


def _default(parameter: inspect.Parameter, info: OptionInfo | ArgumentInfo) -> str:
    if parameter.default is inspect.Parameter.empty:
        return "required"
    if isinstance(info.show_default, str):
        return info.show_default
    value = parameter.default
    return "" if value in (None, "") or value is False else f"`{'yes' if value is True else value}`"


def _help(info: OptionInfo | ArgumentInfo) -> str:
    variables = [info.envvar] if isinstance(info.envvar, str) else info.envvar or []
    given = f" Or the variable {' or '.join(f'`{name}`' for name in variables)}." if variables else ""
    return (_plain(info.help) + given).replace("|", "\\|").replace("*", "\\*")


def _plain(text: str | None) -> str:
    return " ".join((text or "").split())


if __name__ == "__main__":
    sys.stdout.write(cli_page())
