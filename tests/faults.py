"""Single-line faults for the mutation check (`tests.mutations`), each with the tests that should see it."""

from __future__ import annotations

from tests.fault import Fault
from tests.faults_launch import LAUNCH
from tests.faults_planner import PLANNER
from tests.faults_trust import TRUST

UNIT, DISTRIBUTED = "tests/unit", "tests/distributed"
LAYOUT, MESH = f"{UNIT}/test_layout.py", f"{UNIT}/test_mesh.py"
PLACEMENT, TRANSPORT = f"{UNIT}/test_placement.py", f"{UNIT}/test_transport.py"
EXCHANGE = f"{DISTRIBUTED}/test_exchange.py::test_exchanges_deliver_exactly"
FLUX = f"{DISTRIBUTED}/test_pipeline.py::test_every_pipeline_draws_what_one_rank_draws"
FAMILIES = f"{DISTRIBUTED}/test_families.py::test_every_family_draws_what_one_rank_draws"
BRANCHES = f"{DISTRIBUTED}/test_mesh.py::test_each_half_runs_one_branch_of_every_pipeline_that_has_two"
BAD_CALLS = f"{DISTRIBUTED}/test_bad_input.py"
CODECS, COPIES, CALL = f"{UNIT}/test_codecs.py", f"{UNIT}/test_copies.py", f"{UNIT}/test_selective_call.py"

PARALLEL = (
    Fault(
        "every stream's larger shards on the same ranks", "cocodiff/parallel/tokens.py",
        "larger_last=bool(index % 2)", "larger_last=False", (LAYOUT,),
    ),
    Fault(
        "shards as large as that of rank 0", "cocodiff/parallel/tokens.py",
        "return slice(start, start + sizes[rank])", "return slice(start, start + sizes[0])", (f"{EXCHANGE}[3]",),
    ),
    Fault(
        "a mask that ignores how rows were cut", "cocodiff/parallel/tokens.py",
        "torch.cat([joint[rank][:, rows] for", "torch.cat([joint[rank][:, :] for", (f"{FAMILIES}[2]",),
    ),
    Fault("a mask is taken for another one", "cocodiff/parallel/tokens.py",
        "if made is None or made[0] is not source:", "if made is None:", (f"{UNIT}/test_masks.py",)),
    Fault(
        "pieces as long as those of rank 0", "cocodiff/parallel/layout.py",
        "start += lengths[rank]", "start += lengths[0]", (LAYOUT,),
    ),
    Fault(
        "stages without the reordering between them", "cocodiff/parallel/layout.py",
        "moves = _merge(gather) if index else ()", "moves = ()", (LAYOUT,),
    ),
    Fault(
        "receiving what was wanted before the stage", "cocodiff/parallel/layout.py",
        "remaining = wanted(rank, index + 1)", "remaining = wanted(rank, index)", (LAYOUT,),
    ),
    Fault(
        "a message counted at the innermost level that differs", "cocodiff/parallel/layout.py",
        "return max(level for level, (mine, theirs)", "return min(level for level, (mine, theirs)", (LAYOUT, MESH),
    ),
    Fault(
        "an axis that begins at rank 0's neighbour", "cocodiff/parallel/layout.py",
        "// max(stride, inner)))", "// inner))", (MESH,),
    ),
    Fault(
        "a placed axis counts the digits of all levels alike", "cocodiff/parallel/placement.py",
        "places[axis] += part * strides[axis]", "places[axis] += part", (PLACEMENT,),
    ),
    Fault(
        "links of a placed sequence are counted by its places", "cocodiff/parallel/mesh.py",
        "numbers = None if slots is None else", "numbers = None if True else", (PLACEMENT,),
    ),
    Fault(
        "axes of the same ranks share a group in any order", "cocodiff/parallel/placement.py",
        "return {name: sorted(several, key=min)", "return {name: sorted(map(tuple, map(sorted, several)), key=min)",
        (PLACEMENT,),
    ),
    Fault(
        "links of emulated parts are numbered within the part around", "scripts/emulated_network.py",
        "number = around * step.count + index", "number = index",
        (f"{DISTRIBUTED}/test_emulated_cluster.py::test_one_cable_of_an_outer_level_is_as_slow_as_it_says",),
    ),
    Fault("a mesh is kept for all placements", "cocodiff/state.py",
        "key = plan.degrees, plan.placement", "key = plan.degrees, None", (PLACEMENT,)),
)  # fmt: skip

KERNELS = (
    Fault(
        "heads joined as if all ranks had as many as rank 0", "kernels/src/pack.py",
        "start, first = start + numel, first + count", "start, first = start + numel, first + num_heads[0]", (LAYOUT,),
    ),
    Fault(
        "rows packed in rank order for every exchange", "kernels/src/pack.py",
        "if rows.is_contiguous() and all(rank == place for place, rank in enumerate(order)):",
        "if rows.is_contiguous():", (f"{EXCHANGE}[4]",),
    ),
    Fault(
        "parts of attention merged with each other's weight", "kernels/src/partial.py",
        "(lse_other - joint).exp()", "(lse - joint).exp()", (MESH,),
    ),
    Fault("a part without keys weighs as one with keys", "kernels/src/partial.py",
        "NO_KEYS = -1e30", "NO_KEYS = 0.0", (f"{UNIT}/test_kernels.py",)),
    Fault("any log-sum-exp is believed", "kernels/src/partial.py",
        "agrees = agrees and bool((lse - wanted[1]).abs().max() < PROBE_TOLERANCE)", "agrees = True",
        (f"{UNIT}/test_kernels.py",)),
    Fault(
        "the keys that are masked are attended to", "kernels/src/partial.py",
        "bias = bias.masked_fill(~mask, max", "bias = bias.masked_fill(mask, max",
        (f"{UNIT}/test_kernels.py",),  # the probe finds it, and falls back to the reference
    ),
)  # fmt: skip

EXCHANGES = (
    Fault(
        "a rank's own block is not kept", "cocodiff/exchange/messages.py",
        "incoming[rank].copy_(outgoing[rank])", "incoming[rank].zero_()", (f"{EXCHANGE}[2]",),
    ),
    Fault(
        "stages send buffers as they came", "cocodiff/exchange/staged.py",
        "prepare=None if stage.gather is None else", "prepare=None if True else", (f"{EXCHANGE}[4]",),
    ),
    Fault(
        "the ring passes on only its own part", "cocodiff/exchange/ring.py",
        "source = self._transport.pass_on(source,", "source = self._transport.pass_on(own,",
        (f"{FLUX}[4]", f"{FLUX}[6]", f"{FLUX}[8]"),
    ),
    Fault(
        "gathered shards as long as that of rank 0", "cocodiff/exchange/collectives.py",
        "torch.cat([part[:length] for part", "torch.cat([part[: seq_lens[0]] for part", (f"{EXCHANGE}[3]",),
    ),
    Fault(
        "inputs compared with themselves", "cocodiff/exchange/collectives.py",
        "return (everyone != everyone[0]).any()", "return (everyone != everyone).any()", (BAD_CALLS,),
    ),
    Fault(
        "a lane that does not wait for compute", "cocodiff/exchange/lanes.py",
        "self._stream.wait_stream(self._api.current_stream(self.device))", "pass", (f"{UNIT}/test_lanes.py",),
    ),
    Fault(
        "memory that a lane reads is freed", "cocodiff/exchange/lanes.py",
        "keep=(tensor, source))", "keep=())", (f"{UNIT}/test_lanes.py",),
    ),
    Fault("several lanes for an NCCL that keeps no order", "cocodiff/exchange/lanes.py",
        "torch.cuda.nccl.version()[:2] < (2, 26)", "torch.cuda.nccl.version()[:2] < (2, 2)",
        (f"{UNIT}/test_lanes.py",)),
    Fault("coded parts that are equal here count as equal everywhere", "cocodiff/exchange/transport.py",
        "equal = exact_bytes is None and send_splits[0] > 0 and", "equal =", (TRANSPORT,)),
    Fault("messages go to the ranks of the group by place", "cocodiff/exchange/messages.py",
        "group.send([outgoing[r]], members[r],", "group.send([outgoing[r]], r,", (TRANSPORT,)),
    Fault("what is gathered stays in the order of the group", "cocodiff/exchange/transport.py",
        "return everyone if self.in_order else", "return everyone if True else", (TRANSPORT,)),
    Fault("parts arrive in the order of the group", "cocodiff/exchange/transport.py",
        "recv.copy_(_reordered(arrived, arriving, self.members))", "recv.copy_(arrived)", (TRANSPORT,)),
    Fault("what a backend delivers is not looked at", "cocodiff/exchange/delivery.py",
        "if not right]", "if right is None]",
        (f"{DISTRIBUTED}/test_exchange.py::test_transports_of_accelerators_deliver_and_wrong_data_is_an_error_on_every_rank",)),
    Fault(
        "lanes outside the caller's inference mode", "cocodiff/exchange/lanes.py",
        "inference = torch.is_inference_mode_enabled()", "inference = False",
        (f"{DISTRIBUTED}/test_everyday.py::test_lora_scale_inference_mode_and_autocast",),
    ),
)  # fmt: skip

LAYERS = (
    Fault(
        "every piece of V and K lands in the place of the first", "cocodiff/layer.py",
        "start = sum(lengths[:piece])", "start = 0", (f"{FLUX}[2]",),
    ),
    Fault(
        "masks of the parts on the other side of the ring", "cocodiff/layer.py",
        "part = (self.state.part - distance) %", "part = (self.state.part + distance) %",
        (f"{FAMILIES}[4]", f"{FAMILIES}[6]", f"{FAMILIES}[8]"),
    ),
    Fault(
        "every piece finishes with the parallel branch of the first", "cocodiff/attention.py",
        "parallel[:, pieces[piece][0]]", "parallel[:, pieces[0][0]]", (f"{FLUX}[2]",),
    ),
    Fault(
        "a piece is finished before the next one is attended", "cocodiff/attention.py",
        "if state.output_stays_inside:", "if True:", (f"{DISTRIBUTED}/test_overlap.py",),
    ),
    Fault(
        "the textbook order is not kept where it was asked for", "cocodiff/attention.py",
        'for label in "vkq" if overlapped else "qkv":', 'for label in "vkq":', (f"{DISTRIBUTED}/test_overlap.py",),
    ),
    Fault(
        "pieces cut at the joint rows in every stream", "cocodiff/blocks.py",
        "max(rows.start - start, 0) : max(", "max(rows.start, 0) : max(", (f"{FLUX}[2]",),
    ),
    Fault("compute does not wait for lanes when an exception passes", "cocodiff/blocks.py",
        "state.call.session.catch_up()", "pass", (f"{UNIT}/test_lanes.py",)),
    Fault("what was handed on is dropped while lanes use it", "cocodiff/layer.py",
        "for pending in [one for several in self.pending.values() for one in several]:", "for pending in []:",
        (f"{UNIT}/test_lanes.py",)),
    Fault(
        "what was handed on is taken for inputs that changed", "cocodiff/blocks.py",
        "if same and all(a is b for a, b in zip(before, arguments, strict=True)):", "if same:",
        (f"{DISTRIBUTED}/test_everyday.py",),
    ),
    Fault(
        "rows of a fused matrix are taken though a LoRA sits on it", "cocodiff/models/joint.py",
        "if not isinstance(projection, FusedPart) or is_plain_linear(projection.linear):", "if True:",
        (f"{DISTRIBUTED}/test_everyday.py",),
    ),
)  # fmt: skip

FORWARD = (
    Fault(
        "every rank gets the first rows", "cocodiff/pipeline/forward.py",
        "return value.narrow(cut.dim, rows.start,", "return value.narrow(cut.dim, 0,", (f"{FLUX}[2]",),
    ),
    Fault(
        "what the other half saw is not asked for", "cocodiff/pipeline/inputs.py",
        "if anywhere(found.any(), call.connected.everyone) if everywhere else bool(found.any()):",
        "if bool(found.any()):",
        (f"{DISTRIBUTED}/test_mesh.py::test_a_second_branch_that_differs_is_an_error_on_every_rank",),
    ),
    Fault(
        "a backend without log-sum-exp on a ring", "cocodiff/pipeline/forward.py",
        '!= "native":', 'not in ("native", "_native_math"):',
        (f"{DISTRIBUTED}/test_mesh.py::test_degrees_that_cannot_be_are_refused_with_the_numbers",),
    ),
    Fault(
        "both branches are the first", "cocodiff/pipeline/cfg_parallel.py",
        "output.copy_(both[1])", "output.copy_(both[0])", (BRANCHES,),
    ),
    Fault(
        "both halves run the first half of the batch", "cocodiff/pipeline/cfg_parallel.py",
        "half[name] = value[mine]", "half[name] = value[: batch // 2]", (BRANCHES,),
    ),
    Fault(
        "each rank draws its own noise", "cocodiff/pipeline/call.py",
        "share_random_state(job.device, job.host_group)", "pass", (BAD_CALLS,),
    ),
)  # fmt: skip

SELECTIVE = (
    Fault(
        "prediction is switched off", "cocodiff/selective/copies.py",
        "DAMPING = {8: 1.0, 4: 1.0, 2: 1.0, 1: 0.90625}", "DAMPING = {8: 0.0, 4: 0.0, 2: 0.0, 1: 0.0}", (CODECS,),
    ),
    Fault(
        "copies keep the old values", "cocodiff/selective/copies.py",
        "self.value[rows] = new.to(COPY_DTYPE)", "self.value[rows] = before.to(COPY_DTYPE)", (CODECS,),
    ),
    Fault(
        "time that goes back counts as forward", "cocodiff/selective/copies.py",
        "passed = math.copysign(max(abs(passed), SHORTEST), passed)", "passed = max(abs(passed), SHORTEST)", (COPIES,),
    ),
    Fault(
        "decoded rows are not rotated back", "cocodiff/selective/residual.py",
        "out[rows] = rotated(new, back=True)", "out[rows] = rotated(new)", (CODECS,),
    ),
    Fault(
        "the level where coding begins is left exact", "cocodiff/selective/crossing.py",
        "crosses = peer != rank and outer_difference(rank, peer, sizes) >= slow",
        "crosses = peer != rank and outer_difference(rank, peer, sizes) > slow", (f"{DISTRIBUTED}/test_selective.py",),
    ),
    Fault(
        "copies of another prompt are kept", "cocodiff/selective/run.py",
        "self.copies.forget(number)", "pass", (CALL,),
    ),
    Fault(
        "the guard raises steps that missed little", "cocodiff/selective/run.py",
        "if error > bound:", "if error < bound:", (CALL,),
    ),
    Fault(
        "every step is coded as the first", "cocodiff/selective/schedule.py",
        "coding = planned[self.step]", "coding = planned[0]", (f"{UNIT}/test_transmission.py", CALL),
    ),
)  # fmt: skip

FAULTS = (*PARALLEL, *KERNELS, *EXCHANGES, *LAYERS, *FORWARD, *SELECTIVE, *LAUNCH, *TRUST, *PLANNER)
