"""Single-line faults of what must not go unseen: changed models, ranks that differ, calls that are no pairs, leaks."""

from __future__ import annotations

from tests.fault import Fault

CHANGED, GUIDANCE = "tests/distributed/test_changed_models.py", "tests/distributed/test_guidance.py"
REFUSED = f"{CHANGED}::test_what_is_not_diffusers_own_is_refused_by_name_on_all_ranks"
FOLLOWED = f"{CHANGED}::test_what_can_be_followed_is_right"
DIFFERING = f"{CHANGED}::test_ranks_that_differ_are_told_where"
LAST_BITS = f"{CHANGED}::test_the_last_bits_of_an_encoder_do_not_matter"
LIFETIMES, WEIGHTS = "tests/distributed/test_lifetimes.py", "tests/unit/test_weights.py"

TRUST = (
    Fault(
        "functions of others are not looked at", "cocodiff/compat.py",
        "if found := originals.foreign(function):", "if False and (found := originals.foreign(function)):", (REFUSED,),
    ),
    Fault("hooks on parts are not looked at", "cocodiff/compat.py", "    if inside:", "    if False:", (REFUSED,)),
    Fault(
        "what a decorator wraps is not looked at", "cocodiff/compat.py",
        'todo.append(vars(one)["__wrapped__"])', "pass", ("tests/unit/test_originals.py",),
    ),
    Fault(
        "blocks may be others than those at wrap", "cocodiff/pipeline/forward.py",
        "block is not known.module for block", "False for block", (REFUSED,),
    ),
    Fault(
        "unfused projections are taken for fused ones", "cocodiff/models/fused.py",
        'if type(attn).__name__ == "Attention":', "if False:", (FOLLOWED,),
    ),
    Fault(
        "SD3 asks for the back end of all", "cocodiff/models/joint.py",
        '"_attention_backend", AttentionBackendName.NATIVE)', '"_attention_backend", None)', (FOLLOWED,),
    ),
    Fault(
        "chunks of weights may change places", "cocodiff/pipeline/weights.py",
        "total = total * _TURN + (words", "total = total + (words", (WEIGHTS,),
    ),
    Fault(
        "weights that were written to are known", "cocodiff/pipeline/weights.py",
        "!= _version(x)])", "is None])", (WEIGHTS,),
    ),
    Fault(
        "what a call returned may differ", "cocodiff/pipeline/compare.py",
        "if one > last_bits(call.dtype)]", "if one > 1e9]", (DIFFERING,),
    ),
    Fault(
        "ranks keep what they encoded themselves", "cocodiff/pipeline/inputs.py",
        "            x.copy_(theirs)", "            pass", (LAST_BITS,),
    ),
    Fault(
        "inputs that differ much count as rounded", "cocodiff/exchange/collectives.py",
        "return (away > limit *", "return (away > 1e9 * limit *", (LAST_BITS,),
    ),
    Fault(
        "a first branch may be read before it is there", "cocodiff/pipeline/cfg_parallel.py",
        "output = BranchOutput.of(output)", "output.settle = lambda: output", (GUIDANCE,),
    ),
    Fault(
        "a row for the whole batch is cut", "cocodiff/pipeline/cfg_parallel.py",
        "and value.ndim and len(value) > 1:", "and value.ndim:", (GUIDANCE,),
    ),
    Fault(
        "guidance by the outer call alone", "cocodiff/pipeline/call.py",
        "if theirs.__call__ is original:", "if True:", (GUIDANCE,),
    ),
    Fault(
        "two calls at once", "cocodiff/pipeline/call.py",
        "if not session.busy.acquire(blocking=False):", "if session.busy.acquire(blocking=False) is None:",
        (LIFETIMES,),
    ),
    Fault(
        "sessions that nobody has live on", "cocodiff/state.py",
        "self.close = weakref.finalize(self, _end,", "self.close = weakref.finalize(_end, _end,", (LIFETIMES,),
    ),
    Fault(
        "what went ahead is taken though its input was written to", "cocodiff/blocks.py",
        "and versions == _versions(before)", "", ("tests/unit/test_row.py",),
    ),
)  # fmt: skip
