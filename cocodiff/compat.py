"""Everything known of what others put onto pipelines: hooks, offload, adapters, caches, functions of their own.

What cocodiff bypasses, or runs on one rank's tokens, must be what diffusers wrote: `refuse_modifications`.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import torch
from torch import nn

from cocodiff.errors import ConfigError, PatchError

_HOOKS = ("_hf_hook", "_diffusers_hook")  # of accelerate and of diffusers: they act when a module is called
# Whose functions may stand between a pipeline and attention. accelerate's move weights, peft's add adapters.
_TRUSTED = ("cocodiff", "diffusers", "torch", "accelerate", "peft")

# Hooks of diffusers that move or cast weights; all others skip, replace or look at whole sequences.
HARMLESS_HOOKS = (
    "group_offloading",
    "layer_execution_tracker",
    "lazy_leafs",
    "lazy_prefetch_group_offloading",
    "layerwise_casting",
    "peft_autocast_disable",
)


def acts_when_called(block: nn.Module) -> bool:
    """Whether hooks act when this block is called (offloading): then nothing of it may run before that."""
    return any(hook in vars(module) for module in (block, *block.children()) for hook in _HOOKS)


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a linear layer does what its weights say: it has no adapter, no hooks, and the forward of its class."""
    replaced = any(name in vars(module) for name in (*_HOOKS, "forward"))
    return type(module) is nn.Linear and not (module._forward_hooks or module._forward_pre_hooks or replaced)


def offload_to(pipeline: Any, device: torch.device) -> None:
    """Let diffusers' offloading use this device where a script names none: it takes the first one on every rank.

    What was offloaded before, and would be moved to another device, is offloaded anew.
    """
    pipeline._offload_gpu_id = device.index or 0
    before = getattr(pipeline, "_offload_device", None)
    if (
        before in (None, device)
        or before.type != device.type
        or not any(is_offloaded(part) for part in pipeline.components.values())
    ):
        return
    again = pipeline.enable_model_cpu_offload if pipeline._all_hooks else pipeline.enable_sequential_cpu_offload
    again(device=device)


def is_offloaded(part: object) -> bool:
    """Whether accelerate moves this component by its hooks: it must not be moved otherwise."""
    return hasattr(part, "_hf_hook")


def own_forward(module: nn.Module) -> Any:
    """A module's forward, below accelerate's hook if there is one."""
    return vars(module).get("_old_forward", module.forward)


class Originals:
    """Tells functions of diffusers, and of what it stands on, from those of others by the files they are in."""

    def __init__(self) -> None:
        specs = [importlib.util.find_spec(name) for name in _TRUSTED]
        origins = [os.path.dirname(__file__), *(os.path.dirname(one.origin) for one in specs if one and one.origin)]
        self._roots = tuple(os.path.realpath(origin) + os.sep for origin in origins)
        self._trusted: dict[Any, bool] = {}  # function -> whether it is theirs

    def foreign(self, function: Any) -> str | None:
        """Name and file of what somebody else wrote in this function, or in what it wraps; None where nothing is."""
        for one in _unwrapped(function):
            if one not in self._trusted:
                file = os.path.realpath(one.__code__.co_filename)
                self._trusted[one] = file.startswith(self._roots)
            if not self._trusted[one]:
                return f"{one.__qualname__} of {one.__code__.co_filename}"
        return None


def _unwrapped(function: Any) -> Iterator[Any]:
    """The functions with code that a callable consists of: partial objects, bound methods and decorators taken off."""
    todo = [function]
    while todo:
        one = todo.pop()
        if isinstance(one, functools.partial | MethodType):
            todo.append(one.func if isinstance(one, functools.partial) else one.__func__)
        elif hasattr(one, "__code__"):
            yield one
        elif not isinstance(one, type) and hasattr(type(one).__call__, "__code__"):
            yield type(one).__call__
        if hasattr(one, "__dict__") and "__wrapped__" in vars(one):
            todo.append(vars(one)["__wrapped__"])


def refuse_modifications(transformer: Any, originals: Originals) -> None:
    """Raise for what shards cannot follow: step caches, foreign functions and hooks, compilation.

    PatchError, or ConfigError for an attention processor.
    """
    named = list(transformer.named_modules())
    hooks = {name for _, module in named for name in getattr(vars(module).get("_diffusers_hook"), "hooks", ())}
    harmful = sorted(hooks - set(HARMLESS_HOOKS))
    reasons = {
        "a step cache is enabled": bool(getattr(transformer, "is_cache_enabled", False))
        and "each rank would decide by its own tokens whether to skip a block, and ranks that disagree hang. "
        "Call transformer.disable_cache()",
        f"the hooks {', '.join(harmful)} of diffusers are set": harmful
        and "they skip, keep or look at whole sequences, and ranks that decide differently hang. Remove them",
        "diffusers' own parallelism is enabled": getattr(transformer, "_parallel_config", None) is not None
        and "it would split what is split already. Do not call enable_parallelism",
        "the transformer is compiled": any(_is_compiled(module) for _, module in named)
        and "exchanges run in lanes that torch.compile cannot see. Do not compile it",
        "the transformer is quantised": getattr(transformer, "hf_quantizer", None) is not None
        and "activations quantised per tensor would depend on which tokens a rank holds. Load it unquantised",
    }
    for what, reason in reasons.items():
        if reason:
            raise PatchError(f"{what}, but {reason}.")
    for name, module in named:
        for what, function in _functions(module, inside=module is not transformer):
            if found := originals.foreign(function):
                kind = ConfigError if what == "processor" else PatchError
                raise kind(
                    f"{name or 'the transformer'} ({type(module).__name__}): its {what} is {found}, which is not "
                    "diffusers' own and would see one rank's tokens alone, or be passed by. Take it off (a forward "
                    "hook may stay on the transformer itself), or see docs/adding-a-model.md."
                )


def _is_compiled(module: nn.Module) -> bool:
    marked = getattr(module, "_compiled_call_impl", None) or type(module).__name__ == "OptimizedModule"
    return bool(marked) or hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable")


def _functions(module: nn.Module, inside: bool) -> Iterator[tuple[str, Callable[..., Any]]]:
    """What runs when a module is called. `inside`: it is a part of the transformer, where hooks see shards."""
    yield "forward", type(module).forward
    own = vars(module)
    if "forward" in own:
        yield "forward", own["forward"]
    if "processor" in own:
        yield "processor", type(own["processor"]).__call__
    if inside:
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            yield "forward hook", hook


def is_on_disk(module: nn.Module) -> bool:
    """Whether group offloading keeps weights of this module in files: what is in memory then means nothing."""
    registries = [vars(part).get("_diffusers_hook") for part in module.modules()]
    groups = [getattr(getattr(one, "hooks", {}).get("group_offloading"), "group", None) for one in registries]
    return any(getattr(group, "offload_to_disk_path", None) is not None for group in groups)
