"""MODEL on a command line or in a config → a model and an example batch, or a graph that was saved.

In: text: `file.py:function`, a Hugging Face `config.json` (or a folder with one), a preset's name, or a saved graph. Out: a `Source`:
`graph()` for the planner, `build()` for training. Finding out what the text means imports no torch; only building a model does.

>>> find("llama3-8b").kind
'config'
>>> find("llama4-8b")
Traceback (most recent call last):
autoshard.errors.ConfigError: no model 'llama4-8b'
  hint: expected file.py:function, a Hugging Face config.json or its folder, a saved graph, or one of deepseek-v3, llama3-405b, ...
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import AutoshardError, ConfigError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from .trace.captured import Captured
    from .trace.graph import Graph

PRESETS = Path(__file__).parent / "presets"
MAX_CONFIG = 4 << 20
MAX_GRAPH = 4 << 30
KINDS = {"function": "a function of yours", "config": "a Hugging Face config", "graph": "a saved graph"}
TOKENS = ("tokens", "input_ids", "inputs", "ids", "idx", "x")
"""Names of a forward's argument that take int64 token ids [batch, seq]."""
TARGETS = ("targets", "target")
"""… that take the tokens one place further."""
LABELS = ("labels",)
"""… that take the tokens themselves: the model shifts them, as Hugging Face's do."""


def presets() -> list[str]:
    """Names of the configs that come with autoshard."""
    return sorted(path.stem for path in PRESETS.glob("*.json"))


@dataclass
class Source:
    """What a MODEL text means. `kind` is one of KINDS."""

    kind: str
    path: Path
    function: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the function, or keys of the config to override."""

    def load_graph(self) -> Graph:
        """The saved graph."""
        from .trace.graph import Graph

        if self.path.stat().st_size > MAX_GRAPH:
            raise ConfigError(f"{self.path} has {self.path.stat().st_size} bytes; a graph has at most {MAX_GRAPH}")
        return Graph.load(self.path)

    def capture(self, batch: int, seq: int) -> Captured:
        """Build on the meta device and capture. Raises CaptureError."""
        import torch

        from .trace.capture import capture

        with torch.device("meta"):
            model, kwargs = self.build(batch=batch, seq=seq)
        return capture(model, (), kwargs)

    def build(self, *, batch: int, seq: int, dtype: str | None = None) -> tuple[nn.Module, dict[str, Any]]:
        """(model, example keyword arguments), on torch's current default device."""
        if self.kind == "graph":
            raise ConfigError(f"{self.path} is a saved graph, which has no model to build", hint="give the model that it was made from")
        model, kwargs = self.function_model(batch, seq) if self.kind == "function" else (self.config_model(dtype), None)
        if dtype is not None and self.kind == "function":
            model = model.to(getattr(_torch(), dtype))
        return model, example(model, batch, seq) if kwargs is None else kwargs

    def maker(self, *, batch: int, seq: int, dtype: str | None = None) -> Callable[[], nn.Module]:
        """A function without arguments that makes the model alone."""

        def make() -> nn.Module:
            return self.build(batch=batch, seq=seq, dtype=dtype)[0]

        return make

    # ---- a function in a file -----------------------------------------------------------------------------------------

    def function_model(self, batch: int, seq: int) -> tuple[nn.Module, dict[str, Any] | None]:
        torch = _torch()
        function = self._function()
        arguments = dict(self.arguments)
        accepted = _parameters(function)
        arguments |= {k: v for k, v in (("batch", batch), ("seq", seq)) if k in accepted and k not in arguments}
        unknown = [k for k in arguments if k not in accepted and None not in accepted]
        if unknown:
            raise ConfigError(f"{self} takes no argument {unknown[0]!r}", hint=f"it takes {', '.join(k for k in accepted if k) or 'none'}")
        made = function(**arguments)
        model, kwargs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
        if not isinstance(model, torch.nn.Module) or not (kwargs is None or isinstance(kwargs, Mapping)):
            raise ConfigError(
                f"{self} returns {type(made).__name__}", hint="expected a model, or (model, keyword arguments of an example batch)"
            )
        return model, None if kwargs is None else dict(kwargs)

    def _function(self) -> Callable[..., Any]:
        name = f"autoshard_model_{self.path.stem}"
        spec = importlib.util.spec_from_file_location(name, self.path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses look their module up
        with _importable(self.path.parent):
            spec.loader.exec_module(module)
        found = getattr(module, self.function, None)
        if not callable(found):
            has = [k for k, v in vars(module).items() if callable(v) and getattr(v, "__module__", "") == name and not k.startswith("_")]
            raise ConfigError(f"{self.path} has no function {self.function!r}", hint=f"it has {', '.join(has) or 'none'}")
        return found  # type: ignore[no-any-return]

    # ---- Hugging Face ---------------------------------------------------------------------------------------------------

    def config_model(self, dtype: str | None = None) -> nn.Module:
        """AutoModelForCausalLM of the config, without weights of its own."""
        torch, transformers = _torch(), _transformers()
        data = _read_config(self.path) | self.arguments
        kind = data.pop("model_type", None)
        text = dtype or data.get("dtype") or data.get("torch_dtype") or "float32"
        try:
            config = transformers.AutoConfig.for_model(kind, **data)
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"transformers {transformers.__version__} can't read {self.path}: {error}", hint="is its model_type known?"
            ) from error
        config.use_cache = False
        if hasattr(config, "_experts_implementation"):
            config._experts_implementation = "batched_mm"  # the spelling that exports as one graph
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, str(text).removeprefix("torch.")))
        return model.train()  # type: ignore[no-any-return]

    def __str__(self) -> str:
        return f"{self.path}:{self.function}" if self.function else str(self.path)


def find(text: str, arguments: Mapping[str, Any] | None = None) -> Source:
    """What a MODEL text means. Raises ConfigError."""
    given = dict(arguments or {})
    if text in presets() and not Path(text).exists():
        return Source("config", PRESETS / f"{text}.json", arguments=given)
    file, colon, function = text.rpartition(":")
    if colon and file.endswith(".py"):
        if not Path(file).is_file():
            raise ConfigError(f"no file {file}", where=text)
        if not function.isidentifier():
            raise ConfigError(f"{function!r} is not a function's name", where=text)
        return Source("function", Path(file), function, given)
    path = Path(text)
    if path.is_dir() and (path / "config.json").is_file():
        path /= "config.json"
    if path.is_file() and path.suffix == ".py":
        raise ConfigError(f"{path} names no function", hint=f"{path}:FUNCTION, which returns a model")
    if path.is_file():
        return Source("config" if _is_config(path) else "graph", path, arguments=given)
    raise ConfigError(
        f"no model {text!r}",
        hint=f"expected file.py:function, a Hugging Face config.json or its folder, a saved graph, or one of {', '.join(presets())}",
    )


def example(model: nn.Module, batch: int, seq: int) -> dict[str, torch.Tensor]:
    """Token ids for a forward whose arguments have names that say what they are. Raises ConfigError."""
    torch = _torch()
    names = fields_of(model)
    return {name: torch.zeros(batch, seq, dtype=torch.int64) for name in names}


def fields_of(model: nn.Module) -> dict[str, str]:
    """Which arguments of forward a batch of text fills, each with "tokens" or "next" (the tokens one place further).

    Raises ConfigError where it takes an argument that text can't fill, or takes no tokens.
    """
    parameters = inspect.signature(model.forward).parameters
    found: dict[str, str] = {}
    for name, parameter in parameters.items():
        if name in TOKENS and "tokens" not in found.values():
            found[name] = "tokens"
        elif name in LABELS:
            found[name] = "tokens"
        elif name in TARGETS:
            found[name] = "next"
        elif parameter.default is parameter.empty and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            raise ConfigError(
                f"{type(model).__name__}.forward takes {name!r}, and nothing says what that is",
                hint="let the function return (model, keyword arguments of an example batch), or name the data's fields",
            )
    if "tokens" not in found.values():
        raise ConfigError(f"{type(model).__name__}.forward takes no tokens", hint=f"expected an argument named one of {', '.join(TOKENS)}")
    return found


def vocabulary(model: nn.Module) -> int | None:
    """The number of token ids that the model knows, where its config says so."""
    config = getattr(model, "config", None)
    found = getattr(config, "vocab_size", None) or getattr(config, "vocab", None)
    return found if isinstance(found, int) else None


def _parameters(function: Callable[..., Any]) -> list[str | None]:
    """Names that may be given; None among them: any."""
    found: list[str | None] = []
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            found.append(None)
        elif parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            found.append(name)
    return found


@contextlib.contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Files beside the model's may be imported by it, as if it were run."""
    sys.path.insert(0, str(folder.resolve()))
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(str(folder.resolve()))


def _is_config(path: Path) -> bool:
    if path.stat().st_size > MAX_CONFIG:
        return False
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return False  # Graph.load says what is wrong
    return isinstance(data, dict) and ("model_type" in data or "architectures" in data)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"can't read {path}: {error}") from error
    if not isinstance(data, dict) or not isinstance(data.get("model_type"), str):
        raise ConfigError(f"{path} has no model_type", hint="expected a Hugging Face config.json")
    return data


def _torch() -> Any:
    import torch

    return torch


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise MissingPackage("transformers", "a Hugging Face config") from error
    return transformers


class MissingPackage(ConfigError):
    """An optional package that something asked for needs."""

    def __init__(self, package: str, purpose: str) -> None:
        AutoshardError.__init__(self, f"{purpose} needs the package {package}, which isn't installed", hint=f"pip install {package}")
