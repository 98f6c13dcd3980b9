"""Everything known of what others put onto pipelines (hooks, offload, adapters, caches), and our reversible patches.

Hooks of accelerate and diffusers move a module's forward aside and call it there, so that an attribute of ours may be
found in other places than where it was set.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cocodiff.errors import PatchError

_ABSENT = object()
_HOOKS = ("_hf_hook", "_diffusers_hook")  # of accelerate and of diffusers: they act when a module is called

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


def sample_weights(module: nn.Module) -> Tensor:
    """A few values of each parameter: enough to tell other weights, and adapters, from these."""
    with torch.no_grad():
        sample = [p.flatten()[:8].to(torch.float32) for p in module.parameters() if not p.is_meta]
        return torch.cat(sample).cpu() if sample else torch.zeros(0, device="cpu")


def describe_adapters(module: nn.Module) -> list[str]:
    """Which adapters are active where, and how strongly; their weights are parameters."""
    tuned = [(name, part) for name, part in module.named_modules() if hasattr(part, "active_adapters")]
    return [f"{name} {part.active_adapters} {getattr(part, 'scaling', '')}" for name, part in tuned if name]


def own_forward(module: nn.Module) -> Any:
    """A module's forward, below accelerate's hook if there is one."""
    return vars(module).get("_old_forward", module.forward)


def carriers(transformer: nn.Module, attentions: Sequence[nn.Module]) -> list[nn.Module]:
    """The attention modules and what contains them, without the transformer itself: they see one rank's tokens."""
    ours = {id(module) for module in attentions}
    paths = [name.split(".") for name, module in transformer.named_modules() if id(module) in ours]
    names = {".".join(path[: depth + 1]) for path in paths for depth in range(len(path))}
    return [transformer.get_submodule(name) for name in sorted(names)]


def refuse_modifications(transformer: Any, carriers: Sequence[nn.Module]) -> None:
    """Raise PatchError for step caches, hooks on blocks, compilation, quantisation and other parallelism."""
    modules = list(transformer.modules())
    hooks = {name for module in modules for name in getattr(vars(module).get("_diffusers_hook"), "hooks", ())}
    compiled = [m for m in modules if getattr(m, "_compiled_call_impl", None) or type(m).__name__ == "OptimizedModule"]
    compiled += [m for m in modules if hasattr(vars(m).get("forward"), "_torchdynamo_orig_callable")]
    reasons = {
        "a step cache is enabled": bool(getattr(transformer, "is_cache_enabled", False))
        and "each rank would decide by its own tokens whether to skip a block, and ranks that disagree hang. "
        "Call transformer.disable_cache()",
        f"the hooks {', '.join(sorted(hooks - set(HARMLESS_HOOKS)))} of diffusers are set": hooks - set(HARMLESS_HOOKS)
        and "they skip, keep or look at whole sequences, and ranks that decide differently hang. Remove them",
        "a block or an attention module has forward hooks": any(
            m._forward_hooks or m._forward_pre_hooks for m in carriers
        )
        and "they would see one rank's tokens alone. Remove them, or hook the transformer or its linear layers",
        "diffusers' own parallelism is enabled": getattr(transformer, "_parallel_config", None) is not None
        and "it would split what is split already. Do not call enable_parallelism",
        "the transformer is compiled": compiled
        and "exchanges run in lanes that torch.compile cannot see. Do not compile it",
        "the transformer is quantised": getattr(transformer, "hf_quantizer", None) is not None
        and "activations quantised per tensor would depend on which tokens a rank holds. Load it unquantised",
    }
    for what, reason in reasons.items():
        if reason:
            raise PatchError(f"{what}, but {reason}.")


@dataclass(frozen=True)
class _Patch:
    instance: Any
    name: str
    before: Any
    ours: Any
    may_be_replaced: bool

    def places(self) -> Iterator[tuple[Any, str]]:
        """Where an attribute may be now: hooks of accelerate and diffusers move a forward aside and call it there."""
        yield self.instance, self.name
        yield self.instance, f"_old_{self.name}"
        for reference in getattr(vars(self.instance).get("_diffusers_hook"), "_fn_refs", ()):
            yield reference, "forward"
            yield reference, "original_forward"

    def find(self) -> tuple[Any, str] | None:
        return next((place for place in self.places() if vars(place[0]).get(place[1], _ABSENT) is self.ours), None)


class Patches:
    """A list of attributes set on instances, and how to take them back.

    >>> from types import SimpleNamespace
    >>> thing, patches = SimpleNamespace(colour="red"), Patches()
    >>> patches.set(thing, "colour", "blue"); patches.undo(); thing.colour
    'red'
    """

    def __init__(self) -> None:
        self._done: list[_Patch] = []

    def set(self, instance: Any, name: str, value: Any, *, may_be_replaced: bool = False) -> None:
        """Set an attribute; under accelerate's hook, if there is one, so that removing the hook leaves it in place.

        One that may be replaced later by others is left to them by `check` and `undo`.
        """
        holder = f"_old_{name}" if f"_old_{name}" in vars(instance) else name
        self._done.append(_Patch(instance, name, vars(instance).get(holder, _ABSENT), value, may_be_replaced))
        setattr(instance, holder, value)

    def check(self) -> None:
        """PatchError where something of ours is no longer in place."""
        for patch in self._done:
            if patch.find() is None and not patch.may_be_replaced:
                raise PatchError(
                    f"{type(patch.instance).__name__}.{patch.name} was replaced after cocodiff.wrap. Take off what was "
                    "added later (hooks, compilation, caches); or unwrap(pipe) before it is added and wrap(pipe) after."
                )

    def undo(self) -> None:
        """Take everything back, last change first. PatchError, with nothing undone, where others patched over ours."""
        self.check()
        for patch in reversed(self._done):
            place = patch.find()
            if place is None:
                continue
            if patch.before is _ABSENT and place == (patch.instance, patch.name):
                delattr(*place)
            else:
                by_class = patch.before is _ABSENT
                value = getattr(type(patch.instance), patch.name).__get__(patch.instance) if by_class else patch.before
                setattr(*place, value)
        self._done.clear()
