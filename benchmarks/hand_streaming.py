"""The least that streaming asks of a step: a training thread that sleeps, copies and adds, and bare sockets beside it.

A fragment is copied aside in one step, and `delay` steps later the new values enter: local += new - sent, over memory
that is there. Between the two a thread encodes and sends, receives and decodes. No names, digests, checks, HTTP,
retries or saving; whoever fails hangs. Of the longest step of `diloco_exchange.py` it tells how much is this machine's:
both workers copy, and the server computes, on the same processors.
"""

import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from hand_exchange import PIECE, outer_step, pieces, receive
from torch import Tensor


@dataclass(frozen=True)
class Pace:
    """So many fragments of so many numbers take turns, each every `sync_every` steps of `compute_s` seconds."""

    num_fragments: int
    numel: int
    sync_every: int
    delay: int
    steps: int
    compute_s: float

    @property
    def turns(self) -> list[int]:
        """The steps after which a fragment is sent, as far as its values can still enter."""
        stride = self.sync_every // self.num_fragments
        return list(range(stride, self.steps - self.delay + 1, stride))


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.view(torch.uint8).numpy())


@torch.no_grad()
def hand_work(pace: Pace, address: str, port: int) -> list[float]:
    """The seconds of each step of a worker."""
    local = [torch.full((pace.numel,), 1e-3) for _ in range(pace.num_fragments)]
    anchor = [torch.zeros(pace.numel) for _ in local]
    residual = [torch.zeros(pace.numel) for _ in local]
    sent, new = torch.ones(pace.numel), torch.ones(pace.numel)
    coded, scratch = torch.zeros(pace.numel, dtype=torch.bfloat16), torch.zeros(PIECE)

    def exchange(sock: socket.socket, fragment: int) -> None:
        for base, now, left, out in pieces(anchor[fragment], sent, residual[fragment], coded):
            left.add_(torch.sub(base, now, out=scratch[: len(base)]))
            out.copy_(left)
            left.sub_(out)
            sock.sendall(_bytes(out))
        for base, out, value in pieces(anchor[fragment], coded, new):
            receive(sock, out)
            torch.add(base, out, out=value)
            base.copy_(value)

    seconds, under_way, fragment, due = [], None, 0, 0
    with socket.create_connection((address, port)) as sock:
        for step in range(1, pace.steps + 1):
            begun = time.perf_counter()
            time.sleep(pace.compute_s)
            if under_way is not None and step == due:
                under_way.join()
                # Twice over all of it: piece by piece, once over it, takes 1.3 times as long here.
                torch.add(new, local[fragment].sub_(sent), out=local[fragment])
                under_way = None
            if step in pace.turns:
                fragment, due = pace.turns.index(step) % pace.num_fragments, step + pace.delay
                sent.copy_(local[fragment])
                under_way = threading.Thread(target=exchange, args=(sock, fragment))
                under_way.start()
            seconds.append(time.perf_counter() - begun)
    return seconds


@torch.no_grad()
def hand_serve(pace: Pace, listening: socket.socket, workers: int = 2) -> None:
    """Make the outer step for so many workers, and send each piece of it as it is made."""
    master, published, momentum = ([torch.zeros(pace.numel) for _ in range(pace.num_fragments)] for _ in range(3))
    change, gradient = torch.zeros(pace.numel, dtype=torch.bfloat16), torch.zeros(PIECE)
    came = [torch.zeros(pace.numel, dtype=torch.bfloat16) for _ in range(workers)]
    socks = [listening.accept()[0] for _ in range(workers)]
    changed = threading.Condition()
    made = 0

    def send(sock: socket.socket) -> None:
        done = 0
        while done < pace.numel:
            with changed:
                while made <= done:
                    changed.wait()
                upto = made
            sock.sendall(_bytes(change[done:upto]))
            done = upto

    for turn in range(len(pace.turns)):
        fragment = turn % pace.num_fragments
        _together([threading.Thread(target=receive, args=each) for each in zip(socks, came, strict=True)])
        made = 0
        senders = [threading.Thread(target=send, args=(sock,)) for sock in socks]
        for sender in senders:
            sender.start()
        for value, known, moment, out, *parts in pieces(
            master[fragment], published[fragment], momentum[fragment], change, *came
        ):
            outer_step(value, known, moment, out, parts, gradient)
            with changed:
                made += len(value)
                changed.notify_all()
        for sender in senders:
            sender.join()


def _together(threads: Sequence[threading.Thread]) -> None:
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
