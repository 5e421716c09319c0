"""The number of threads follows the load of the machine, on a simulated clock."""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest
from lab import TOKENIZER, small_model

from model import threads
from model.inference.engine import STEP_COST, Engine, SamplingParams
from model.threads import ThreadTuner, other_runnable_threads
from scripts import serve_openai_api

CORES = 2
SPEED = {(2, 0): 11_000, (1, 0): 6_500, (2, 1): 3_000, (1, 1): 6_300, (2, 2): 2_300, (1, 2): 4_200}  # tokens/s


class Machine:
    """A training loop on two cores with other busy programs, as measured on a real one."""

    def __init__(self, monkeypatch, cpu_share: float = 1.0):
        self.time = self.cpu_time = 0.0
        self.hogs, self.cpu_share, self.used = 0, cpu_share, []
        self.tuner = ThreadTuner(all_threads=CORES)
        monkeypatch.setattr(threads, "notice", self.used.append)
        self.tuner.wall, self.tuner.cpu = lambda: self.time, lambda: self.cpu_time
        self.tuner.get_threads, self.tuner.set_threads = lambda: self.tuner.threads, lambda n: None
        self.tuner.count_others = lambda: self.hogs

    def run(self, seconds: float, tokens: int = 300) -> float:
        """→ tokens/s"""
        start, done = self.time, 0
        while self.time < start + seconds:
            n = self.tuner.threads
            self.tuner.begin()
            step = tokens / SPEED[n, self.hogs]
            self.time += step
            self.cpu_time += self.cpu_share * step * n * min(1, CORES / (n + self.hogs))
            self.tuner.end(tokens)
            done += tokens
        return done / (self.time - start)


def test_alone_all_threads_are_used(monkeypatch):
    machine = Machine(monkeypatch)
    assert machine.run(300) == pytest.approx(SPEED[2, 0]) and not machine.used


@pytest.mark.parametrize("hogs, least", [(1, 0.5), (2, 0.34)])
def test_beside_busy_programs_fewer_are_used_until_these_end(monkeypatch, hogs, least):
    machine = Machine(monkeypatch)
    machine.run(20)
    machine.hogs = hogs
    assert machine.run(120) > least * SPEED[2, 0]
    assert machine.tuner.threads == 1 and machine.used == [
        "other programs use the processor: 1 instead of 2 threads are faster for now"]
    machine.hogs = 0
    machine.run(threads.MAX_RETRY_S)
    assert machine.tuner.threads == 2 and machine.run(60) == pytest.approx(SPEED[2, 0])


def test_a_busy_start_is_noticed(monkeypatch):
    machine = Machine(monkeypatch)
    machine.hogs = 1
    assert machine.run(60) > 0.8 * SPEED[1, 1]


def test_waiting_for_data_is_no_reason(monkeypatch):
    machine = Machine(monkeypatch, cpu_share=0.4)
    machine.run(100)
    assert machine.tuner.threads == 2


def test_where_the_system_tells_nothing_a_wrong_guess_costs_little(monkeypatch):
    machine = Machine(monkeypatch, cpu_share=0.4)
    machine.tuner.count_others = lambda: None
    assert machine.run(600) > 0.97 * SPEED[2, 0] and machine.tuner.threads == 2


def test_an_engine_takes_the_steps_of_every_thread_with_the_number_that_it_chose(monkeypatch):
    engine, used, steps = Engine(small_model(), max_batch=2, adapt_threads=True), set(), []
    engine.threads = ThreadTuner(all_threads=4)
    engine.threads.threads = 3
    monkeypatch.setattr(engine.threads, "get_threads", lambda: 4)
    monkeypatch.setattr(engine.threads, "set_threads", used.add)
    monkeypatch.setattr(engine.threads, "end", steps.append)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(engine.generate, [[5, 6, 7], [8]], [SamplingParams(2, stop_ids=())] * 2).result()
    assert used == {3} and steps == [STEP_COST + 4, STEP_COST + 2]
    assert not Engine(small_model()).threads.enabled


def test_one_thread_and_other_devices_are_left_alone():
    assert not ThreadTuner(all_threads=1).enabled and not ThreadTuner(enabled=False, all_threads=8).enabled
    others = other_runnable_threads()
    assert others is None or others >= 0


def test_the_main_thread_of_the_server_computes_nothing(monkeypatch):
    """Its workers would be more than there are cores, beside those of the engine's thread."""
    seen = []
    for name, result in (("load_from_args", (small_model(), TOKENIZER)), ("EngineThread", None)):
        monkeypatch.setattr(serve_openai_api, name, lambda *_, result=result: seen.append(
            threading.current_thread()) or result)
    for name in ("create_app", "Server"):
        monkeypatch.setattr(serve_openai_api, name, mock.MagicMock())
    monkeypatch.setattr(sys, "argv", ["serve_openai_api.py", "--port=0"])
    serve_openai_api.main()
    assert len(seen) == 2 and threading.main_thread() not in seen and not any(thread.is_alive() for thread in seen)
