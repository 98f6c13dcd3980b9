"""The guard of one rank or two in one process: what it raises, says and decides, without collectives."""

from __future__ import annotations

import subprocess
import sys
import threading
from contextlib import ExitStack

import pytest
import torch.distributed as dist

from cocodiff.errors import LaunchError, UsageError
from cocodiff.launch import Guard, guard, leaving, mailbox
from cocodiff.launch.waits import Waits

GLOO = "[third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:64727"


@pytest.fixture
def pair(monkeypatch):
    """Both guards of a run of two ranks, on one store; whoever ends its process is recorded instead."""
    monkeypatch.setattr(mailbox, "_ROUND_SECONDS", 0.1)
    monkeypatch.setattr(guard, "_LOOK_SECONDS", 0.1)
    with ExitStack() as stack:

        def make(**settings):
            store = dist.HashStore()
            guards = [Guard(store, rank, 2, **settings) for rank in range(2)]
            for one in guards:
                stack.callback(one.close)
                one.ended, one.why = threading.Event(), ""

                def end(call, why, one=one):
                    one.why = why
                    one.ended.set()

                one._end = end
            return guards

        yield make


def test_a_guard_reports_and_raises_on():
    store = dist.HashStore()
    guards = [Guard(store, rank, 2) for rank in range(2)]
    with pytest.raises(ValueError, match="^two\nlines$"):
        with guards[1].watch("generation"):
            with guards[1].watch("an inner call"):
                raise ValueError("two\nlines")
    report = dist.PrefixStore("cocodiff/guard/1", store).get("failed/1").decode()
    assert report == "rank 1 failed in generation: ValueError: two lines"
    with guards[1].watch("the next call"):
        pass
    for one in reversed(guards):
        one.close()
        one.close()
    with guards[1].watch("watches nothing"):
        pass


def test_a_guard_on_one_rank_starts_no_thread():
    guard = Guard(dist.HashStore(), 0, 1)
    with pytest.raises(KeyError):
        with guard.watch("generation"):
            raise KeyError
    assert guard._thread is None
    guard.close()


def test_a_guards_process_ends_at_once_without_close():
    script = """
import torch.distributed as dist
from datetime import timedelta
from cocodiff.launch.guard import Guard
store = dist.TCPStore("127.0.0.1", 0, 2, True, timedelta(seconds=5), wait_for_workers=False)
Guard(store, 1, 2).watch("generation").__enter__()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "terminate" not in done.stderr and "Traceback" not in done.stderr


def test_a_connection_that_broke_names_the_rank_that_failed(pair):
    guards = pair()
    with pytest.raises(OSError, match="^the disk is full$"), guards[1].watch("a call"):
        raise OSError("the disk is full")
    with pytest.raises(LaunchError, match="because rank 1 failed in a call: OSError: the disk is full") as caught:
        with guards[0].watch("a call"):
            raise RuntimeError(GLOO)
    assert str(caught.value.__cause__) == GLOO


def test_what_fails_alike_on_all_ranks_stays_what_it_is(pair):
    for one in pair():
        with pytest.raises(RuntimeError, match="^out of memory$"), one.watch("a call"):
            raise RuntimeError("out of memory")


@pytest.mark.parametrize("alive", [True, False])
def test_a_connection_that_broke_without_a_reason_names_the_rank_that_is_gone(alive, pair, monkeypatch):
    monkeypatch.setattr(guard, "_CAUSE_SECONDS", 3.0 if alive else 0.5)
    first, second = pair()
    with ExitStack() as stack:
        stack.enter_context(second.watch("a call"))
        second._mail.wait_for(lambda: second._mail.letters.answers > 0, 60)
        if not alive:
            second._mail.close()  # as a kill would end its signs
        with pytest.raises(RuntimeError) as caught, first.watch("a call"):
            first._mail.wait_for(lambda: first._mail.letters.signs[1] is not None, 60)
            raise RuntimeError(GLOO)
        if alive:
            assert str(caught.value) == GLOO
        else:
            assert "there is no sign of life from rank 1 since" in str(caught.value)
            assert isinstance(caught.value, LaunchError)


def test_leaving_a_call_by_exit_is_a_failure(pair, capfd):
    first, second = pair()
    with pytest.raises(LaunchError, match=r"rank 1 left a call by sys.exit\(0\)"), second.watch("a call"):
        sys.exit(0)
    with pytest.raises(LaunchError, match=r"because rank 1 left a call by sys.exit\(0\)"), first.watch("a call"):
        raise RuntimeError(GLOO)
    with pytest.raises(SystemExit) as caught, second.watch("a call"):
        sys.exit(3)
    assert caught.value.code == 3
    assert "cocodiff: rank 1 left a call by sys.exit(3), and the other ranks wait in it" in capfd.readouterr().err


def test_another_thread_is_refused(pair):
    first, _ = pair()
    errors = []

    def ask():
        try:
            with first.watch("another call"):
                pass
        except UsageError as error:
            errors.append(str(error))

    with first.watch("a call"):
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()
    assert len(errors) == 1 and "another thread of this process is in a call: one call at a time" in errors[0]
    assert first._mail.sign.depth == 0 and first._mail.sign.call == 1


def test_a_rank_that_never_comes_ends_the_run_and_is_named(pair, capfd):
    first, second = pair(waits=Waits(notice_seconds=0.5, absent_seconds=2))
    with second.watch("loading"), first.watch("loading"):
        pass
    with first.watch("a call"):
        assert first.ended.wait(120)
    assert "in vain for rank 1 to make a call" in first.why and not second.ended.is_set()
    assert "rank 0: it has waited" in capfd.readouterr().err


class SilentStore:
    """A store beyond a link that is cut: it does not answer, whatever its time-out is."""

    def __init__(self) -> None:
        self.cut = threading.Event()

    def clone(self):
        return self

    def set_timeout(self, timeout):
        pass

    def set(self, key, value):
        self.cut.wait()
        raise RuntimeError("Broken pipe")


def test_a_guard_behind_a_cut_link_decides(pair, monkeypatch):
    monkeypatch.setattr(guard, "_CAUSE_SECONDS", 0.1)
    first, _ = pair(waits=Waits(notice_seconds=0.5, silent_seconds=2))
    store = SilentStore()
    first._mail._store = store
    with first.watch("a call"):
        assert first.ended.wait(120)
    assert "the run's store, which rank 0 or its launcher holds, has given no answer" in first.why
    with pytest.raises(ValueError, match="its own"), first.watch("a call"):  # not held up for ever either
        raise ValueError("its own")
    store.cut.set()


def test_who_does_not_know_the_secret_ends_nobody(pair):
    first, _ = pair(token="secret", grace_seconds=0.0)
    store = first._mail._store.underlying_store
    store.set("cocodiff/guard/1/failed/1", "boo")
    with first.watch("a call"):
        assert first._mail.wait_for(lambda: first._mail.letters.answers > 2, 60)
        assert first._view().report is None
        store.set("cocodiff/guardsecret/1/failed/1", "boo \x1b[31m\nred")  # and who does cannot paint the terminal
        assert first.ended.wait(60)
    assert first.why == "it still waits 0 s after it heard: boo ?[31m red"


def test_a_rank_that_ends_between_calls_is_missed(pair):
    first, second = pair(grace_seconds=0.0)
    with second.watch("loading"), first.watch("loading"):
        pass
    second.close()
    with first.watch("a call"):
        assert first.ended.wait(60)
    assert first.why.startswith("it still waits 0 s after it heard: rank 1 ended before this call. Every rank must")


def test_threads_at_work_are_told_from_idle_ones():
    stop, begun = threading.Event(), threading.Event()

    def busy():
        begun.set()
        while not stop.is_set():
            pass

    thread = threading.Thread(target=busy, name="cocodiff lane node", daemon=True)
    thread.start()
    begun.wait()
    try:
        assert leaving.threads_at_work() == ["cocodiff lane node"]
    finally:
        stop.set()
        thread.join()
    assert leaving.threads_at_work() == []


@pytest.mark.parametrize(("error", "status"), [("KeyboardInterrupt", -2), ("ValueError", 1)])
def test_a_process_whose_thread_is_inside_torch_ends_at_once(error, status):
    script = f"""
import ctypes, threading
import torch.distributed as dist
from cocodiff.launch.guard import Guard
def collective():
    ctypes.CDLL(None).sleep(600)
threading.Thread(target=collective, name="cocodiff lane node", daemon=True).start()
with Guard(dist.HashStore(), 1, 2).watch("a call"):
    raise {error}
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=200)
    assert done.returncode == status and error in done.stderr, done.stderr
