"""Fewer threads while other programs use the processor's cores.

A parallel region of OpenMP ends when its last thread does. Where another program has a core, one thread of the region
waits for that core, and all others wait for it: a single busy program can cost three quarters of the speed.
"""

import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch

from model.cli import notice

T = TypeVar("T")
WINDOW_S = 1.0  # time that is measured before each decision
RETRY_S = 10.0  # until all threads are tried again; doubled after each attempt in vain, up to MAX_RETRY_S
MAX_RETRY_S = 300.0
GAIN = 1.1  # a number of threads replaces another if it is this much faster


def run_in_thread(function: Callable[..., T], *args) -> T:
    """function(*args) in a thread that ends with it, for programs whose engine steps in a thread of its own.

    A thread that computes starts workers of its own, which stay as long as it does. Where all workers outnumber the
    cores, GNU's OpenMP lets them sleep instead of spin at each barrier: on two cores a token then takes 9 ms, not 6.
    """
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *args).result()


class ThreadTuner:
    """Chooses the number of threads of a loop by its speed: `begin` and `end` go around each step.

    1. With all threads, the share of the cores that this process got is its CPU time / (wall time · threads). Threads
       that wait for each other spin, so alone it gets nearly all.
    2. Where it gets too little, the threads that fit into the share are tried for a window, and kept if that is faster.
    3. From time to time all threads are tried again, since the other program may have ended.
    """

    wall, cpu = staticmethod(time.perf_counter), staticmethod(time.process_time)
    get_threads, set_threads = staticmethod(torch.get_num_threads), staticmethod(torch.set_num_threads)
    count_others, announce = staticmethod(lambda: other_runnable_threads()), staticmethod(lambda text: notice(text))

    def __init__(self, enabled: bool = True, all_threads: int | None = None):
        self.all_threads = self.threads = all_threads or torch.get_num_threads()
        self.enabled = enabled and self.all_threads > 1
        self.speed: dict[int, float] = {}  # items per second, by number of threads, in the last window with it
        self.retry_s, self.next_try = RETRY_S, 0.0
        self.announced = False
        self._reset()

    def _reset(self) -> None:
        self.wall_s = self.cpu_s = 0.0
        self.num_items, self.num_steps = 0, 0
        self.others: list[int] = []  # runnable threads of other programs, sampled
        self.next_sample = 0.0

    def begin(self) -> None:
        if self.enabled:
            if self.get_threads() != self.threads:  # OpenMP keeps one number per thread that calls it
                self.set_threads(self.threads)
            self.start = self.wall(), self.cpu()

    def end(self, num_items: int) -> None:
        """`num_items`: tokens, or what else measures the work of the step."""
        if not self.enabled:
            return
        now = self.wall()
        self.num_steps += 1
        if self.num_steps == 1:  # of a window: may compile for another number of threads, and warms up
            return
        self.wall_s += now - self.start[0]
        self.cpu_s += self.cpu() - self.start[1]
        self.num_items += num_items
        if now >= self.next_sample and (others := self.count_others()) is not None:
            self.others.append(others)
            self.next_sample = now + WINDOW_S / 20
        if self.wall_s >= WINDOW_S:
            self.speed[self.threads] = self.num_items / self.wall_s
            self._decide(now, self.cpu_s / (self.wall_s * self.threads))
            self._reset()

    def _decide(self, now: float, share: float) -> None:
        fewer, previous = self._fitting(share), self.threads
        other = max((n for n in self.speed if n != self.threads), key=self.speed.get, default=None)
        if other and self.speed[other] > GAIN * self.speed[self.threads]:  # what was tried is slower: back
            self._use(other)
            self.retry_s = min(2 * self.retry_s, MAX_RETRY_S)
        elif self.threads == self.all_threads and fewer < self.all_threads and now >= self.next_try:
            self._use(fewer)
        elif self.threads < self.all_threads and now >= self.next_try:
            self._use(self.all_threads)
        elif self.threads == self.all_threads:
            self.retry_s = RETRY_S
        if self.threads != previous:
            self.next_try = now + self.retry_s
            self.speed = {previous: self.speed[previous]}  # older figures are of another load
        if self.threads < self.all_threads and not self.announced and previous == self.threads:
            self.announce(f"other programs use the processor: {self.threads} instead of {self.all_threads} threads are "
                          "faster for now")
            self.announced = True

    def _use(self, threads: int) -> None:
        self.threads = threads
        self.set_threads(threads)

    def _fitting(self, share: float) -> int:
        """The number of threads that the share of the cores is enough for."""
        if self.others and sum(self.others) < 0.5 * len(self.others):  # nobody else waits for a core
            return self.all_threads
        return max(1, int(share * self.all_threads + 0.15))


def other_runnable_threads() -> int | None:
    """Threads of other programs that run or wait for a core now; None where the system does not tell."""
    if sys.platform != "linux":
        return None
    try:
        runnable = int(Path("/proc/loadavg").read_text().split()[3].split("/")[0])
        states = [path.read_text().rpartition(")")[2].split()[0] for path in Path("/proc/self/task").glob("*/stat")]
    except (OSError, ValueError, IndexError):  # a thread may have ended meanwhile
        return None
    return max(0, runnable - states.count("R"))
