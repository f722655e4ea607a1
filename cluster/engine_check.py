"""Asking vLLM whether it accepts an engine's settings, before any process is started for it."""

import dataclasses
import difflib
import logging
import os

from pydantic import ValidationError
from vllm.engine.arg_utils import AsyncEngineArgs

from memory_agent.errors import SettingsError
from replicas.engine_config import build_vllm_config, check_elastic
from replicas.spec import EngineSpec


def check_engine(spec: EngineSpec) -> None:
    """Raises SettingsError where vLLM has no such argument, or refuses a value or the model; and where the engine
    should be elastic but the model cannot be."""
    known = [field.name for field in dataclasses.fields(AsyncEngineArgs)]
    for key in spec.engine_args:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=3, cutoff=0.5)
            meant = f"; did you mean {' or '.join(close)}?" if close else ""
            raise SettingsError(f"model {spec.model_name}: vLLM has no engine argument {key!r}{meant}")
    environment = dict(os.environ)
    logging.disable(logging.CRITICAL)  # what it says here is in the error, or again in the engine's own log
    try:
        config = build_vllm_config(spec)
    except Exception as error:  # vLLM has no base for what its checks raise
        raise SettingsError(f"model {spec.model_name}: vLLM refuses these settings: {_reason(error)}") from error
    finally:
        logging.disable(logging.NOTSET)
        # vLLM prepares the environment for engine processes of its own; Ray and its workers are not that.
        os.environ.clear()
        os.environ.update(environment)
    if spec.elastic:
        try:
            check_elastic(config)
        except SettingsError as error:
            raise SettingsError(f"model {spec.model_name}: {error}") from error


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        items = error.errors(include_url=False)
        return "; ".join(
            f"{'.'.join(map(str, i['loc']))}: {i['msg'].removeprefix('Value error, ')}".removeprefix(": ")
            for i in items
        )
    return f"{error}" or type(error).__name__
