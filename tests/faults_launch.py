"""Single-line faults of how ranks start, agree and end together."""

from __future__ import annotations

from tests.fault import Fault

UNIT = "tests/unit"
BAD_CALLS, ENDING = "tests/distributed/test_bad_input.py", "tests/distributed/test_ending.py"
GUARD, PRESENCE = f"{UNIT}/test_launch_guard.py", f"{UNIT}/test_launch_presence.py"

LAUNCH = (
    Fault(
        "a failure is reported for no call", "cocodiff/launch/guard.py",
        'self._mail.post(self._mail.sign.call, printable(said))', "self._mail.post(0, printable(said))",
        (GUARD, ENDING),
    ),
    Fault(
        "a rank that ends says nothing", "cocodiff/launch/guard.py",
        "self._mail.update(ended=1)", "pass", (GUARD, ENDING),
    ),
    Fault(
        "an inner call is one of its own", "cocodiff/launch/guard.py",
        "told = self._failed(what, error) if is_outer else None", "told = self._failed(what, error)", (GUARD,),
    ),
    Fault(
        "no grace", "cocodiff/launch/presence.py",
        "elif self._time - self._reason_since >= grace_seconds:", "else:", (PRESENCE,),
    ),
    Fault(
        "a rank that is busy elsewhere in the call is ended", "cocodiff/launch/presence.py",
        'as_what = "absent" if sign is None or sign.depth == 0 else "busy"', 'as_what = "absent"', (PRESENCE,),
    ),
    Fault(
        "a process that was stopped itself holds that against the others", "cocodiff/launch/presence.py",
        "min(now - self._last_look, _MOST_SECONDS_A_LOOK)", "now - self._last_look", (PRESENCE,),
    ),
    Fault(
        "a store without an answer is waited for", "cocodiff/launch/presence.py",
        "if seconds >= limit:", "if False:", (PRESENCE,),
    ),
    Fault(
        "the guilty rank is not named", "cocodiff/launch/guard.py",
        "elif is_lost_connection(error):", "elif False:", (GUARD,),
    ),
    Fault(
        "sys.exit(0) is no failure", "cocodiff/launch/guard.py",
        "told = None if error.code else LaunchError(said)", "told = None", (GUARD,),
    ),
    Fault(
        "the store listens everywhere", "cocodiff/launch/rendezvous.py",
        "listener.bind(place)", 'listener.bind(("", place[1]))', (f"{UNIT}/test_launch_join.py",),
    ),
    Fault(
        "collectives keep the time-out of the start", "cocodiff/launch/join.py",
        "dist.distributed_c10d._set_pg_timeout(waits.collective, group)", "pass", (f"{UNIT}/test_launch_join.py",),
    ),
    Fault(
        "two backends are few enough", "cocodiff/launch/join.py",
        "if len(chosen) > 1:", "if len(chosen) > 2:", (ENDING,),
    ),
    Fault(
        "two different values are few enough", "cocodiff/launch/agree.py",
        "if len(ranks_by_value) > 1:", "if len(ranks_by_value) > 2:", (BAD_CALLS,),
    ),
    Fault(
        "devices by the rank of the run", "cocodiff/launch/backend.py",
        "index = local_rank % num_devices if", "index = ranks.rank % num_devices if",
        (f"{UNIT}/test_launch_devices.py",),
    ),
    Fault(
        "a forgotten launcher is silent", "cocodiff/launch/backend.py",
        'if launcher != "none" or num_devices < 2:', "if True:", (f"{UNIT}/test_wrap.py",),
    ),
    Fault(
        "a hub that is not reached is a missing file", "cocodiff/cli/loading.py",
        "one = one.__cause__ or one.__context__", "one = None", (f"{UNIT}/test_cli_models.py",),
    ),
    Fault(
        "a shell in a Slurm allocation is a rank", "cocodiff/launch/ranks.py",
        "if not _in_slurm_step(environ):", "if False:", (f"{UNIT}/test_launch.py",),
    ),
    Fault(
        "half the bandwidth inside is slow", "cocodiff/topology/cluster.py",
        "_SLOW_SHARE = 0.25", "_SLOW_SHARE = 0.5", (f"{UNIT}/test_topology.py",),
    ),
)  # fmt: skip
