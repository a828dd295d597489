"""Ctrl-C ends a part of the reader's that loops for ever, wherever it was called from, and the machine goes on."""

from __future__ import annotations

import signal
import threading

import pytest

from xenlab import Hypervisor, Machine, boot, guests
from xenlab.hypervisor.schedulers import RoundRobin
from xenlab.hypervisor.scheduling import change_scheduler


class Loops(RoundRobin):
    """Loops in one of its methods once it is told to, and says that it has begun."""

    def __init__(self, where: str) -> None:
        super().__init__(500)
        self.where, self.looping, self.begun = where, False, threading.Event()

    def _loop(self, where: str) -> None:
        while self.looping and where == self.where:
            self.begun.set()

    def sleep(self, vcpu: int, now: int) -> None:
        self._loop("sleep")
        super().sleep(vcpu, now)

    def pick(self, now: int) -> tuple[int, int] | None:
        self._loop("pick")
        return super().pick(now)


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="the system cannot interrupt one thread")
@pytest.mark.parametrize("where", ["sleep", "pick"])
def test_ctrl_c_ends_a_scheduler_that_never_returns(where: str) -> None:
    scheduler = Loops(where)
    xen = Hypervisor(Machine(8), scheduler=scheduler)
    for work in ("3000", ""):
        boot(xen, guests.source("worker"), command_line=work)
    xen.run(1)
    scheduler.looping = True
    main = threading.get_ident()

    def interrupt() -> None:
        scheduler.begun.wait(60)
        signal.pthread_kill(main, signal.SIGINT)

    killer = threading.Thread(target=interrupt)
    killer.start()
    with pytest.raises(KeyboardInterrupt):
        xen.run(1_000_000)
    killer.join()
    # In a trap the vCPU that sleeps is asleep for the hypervisor; another scheduler is told so.
    before = xen.now
    change_scheduler(xen, RoundRobin(700))
    assert xen.run(20_000).instructions == 20_000
    assert xen.now == before + 20_000
