"""What changes a transformer in ways that shards cannot follow: refused, with the reason and the way out."""

from __future__ import annotations

from typing import Any

from torch import nn

from cocodiff.errors import PatchError

# Hooks of diffusers that move or cast weights; all others skip, replace or look at whole sequences.
HARMLESS_HOOKS = (
    "group_offloading",
    "layer_execution_tracker",
    "lazy_leafs",
    "lazy_prefetch_group_offloading",
    "layerwise_casting",
    "peft_autocast_disable",
)


def carriers(transformer: nn.Module, attentions: list[nn.Module]) -> list[nn.Module]:
    """The attention modules and what contains them, but for the transformer itself: what sees some tokens alone."""
    ours = {id(module) for module in attentions}
    paths = [name.split(".") for name, module in transformer.named_modules() if id(module) in ours]
    names = {".".join(path[: depth + 1]) for path in paths for depth in range(len(path))}
    return [transformer.get_submodule(name) for name in sorted(names)]


def refuse_modifications(transformer: Any, carriers: list[nn.Module]) -> None:
    """PatchError for step caches, hooks on blocks, compilation, quantisation and other parallelism."""
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
