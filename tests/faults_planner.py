"""Single-line faults of the planner's model."""

from __future__ import annotations

from tests.fault import Fault

TRACE, SIMULATE = "tests/unit/test_planner_trace.py", "tests/unit/test_planner_simulate.py"
MESSAGES = "tests/unit/test_planner_messages.py"
LINKS = "tests/unit/test_planner_links.py"
SEARCH = "tests/unit/test_planner_search.py"

PLANNER = (
    Fault(
        "one block of a kind is left out", "cocodiff/planner/trace.py",
        "[1, len(run) - 2, 1]", "[1, len(run) - 3, 1]", (TRACE,),
    ),
    Fault(
        "everything is run again", "cocodiff/planner/functions.py",
        "called = self._known.called.get(key)", "called = None", (TRACE,),
    ),
    Fault(
        "a function that is known does no work", "cocodiff/planner/functions.py",
        "for work in called.work:", "for work in ():", (TRACE,),
    ),
    Fault(
        "quarters are played where halves gain nothing", "cocodiff/planner/search.py",
        "return fewer is whole or fewer.total < whole.total", "return True", (SEARCH,),
    ),
    Fault(
        "a lane runs all at once", "cocodiff/planner/simulate.py",
        "for job in (jobs[0] for jobs in self._lanes.values() if jobs):",
        "for job in (job for jobs in self._lanes.values() for job in jobs):", (SIMULATE,),
    ),
    Fault(
        "messages do not queue", "cocodiff/planner/messages.py",
        "self._free[link] = ended", "self._free[link] = now", (MESSAGES,),
    ),
    Fault(
        "a message leaves before its receiver waits", "cocodiff/planner/messages.py",
        "if (here, peer, job) not in self._awaited or", "if False or", (MESSAGES,),
    ),
    Fault(
        "every rank plans for itself", "cocodiff/planner/at_call.py",
        "if job.is_main:", "if True:",
        ("tests/distributed/test_plan_auto.py",),
    ),
    Fault(
        "nothing shares a link", "cocodiff/planner/simulate.py",
        "if demand > 1e-12 and free[resource] / demand < growth - 1e-12:", "if False:", (SIMULATE,),
    ),
    Fault(
        "what was not played does not count", "cocodiff/planner/simulate.py",
        "self._left_out += (", "self._left_out += 0 * (", (SIMULATE,),
    ),
    Fault(
        "the ranks of a node do not share its link", "cocodiff/planner/links.py",
        "self._first[at] + here[mine] // self._node[at], weight[mine])",
        "self._first[at] + here[mine] // self._node[at], weight[mine] / 2)", (SIMULATE,),
    ),
    Fault(
        "messages leave a torus where they came in", "cocodiff/planner/links.py",
        "node += (self._digit[done, peer]", "node += 0 * (self._digit[done, peer]", (LINKS,),
    ),
    Fault(
        "a ring is always gone up", "cocodiff/planner/links.py",
        "0.5, 2.0 * ahead < size)", "0.5, 1.0)", (LINKS,),
    ),
    Fault(
        "a message crosses the first link alone", "cocodiff/planner/links.py",
        "for step in range(int(hops.max())):", "for step in range(1):", (LINKS,),
    ),
    Fault(
        "an exchange between nodes loses what one inside loses", "cocodiff/topology/cluster.py",
        "return self.flat_efficiency if own is None else own", "return self.flat_efficiency", (LINKS,),
    ),
    Fault(
        "a part of a ring wraps around", "cocodiff/topology/level.py",
        'part_of_ring = self.wiring == "ring" and', 'part_of_ring = False and', (LINKS,),
    ),
    Fault(
        "a flat exchange's loss bounds a staged one", "cocodiff/planner/search.py",
        "times * costs.fabric.flow(send).seconds for",
        "times * costs.fabric.flow(send).seconds / costs.fabric.flow(send).efficiency for", (SEARCH,),
    ),
    Fault(
        "the search stops too early", "cocodiff/planner/search.py",
        "if len(others) >= keep and bound > others[keep - 1]:", "if len(others) >= keep:", (SEARCH,),
    ),
    Fault(
        "a plan for other ranks is taken", "cocodiff/planner/plan_file.py",
        "if ranks != cluster.num_ranks:", "if False:", (SEARCH,),
    ),
)  # fmt: skip
