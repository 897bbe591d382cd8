"""The least that an exchange is: bare sockets, memory that is there, and the arithmetic in a few calls of torch.

    seconds = hand_exchange_s(megabytes, workers=2, rounds=4, pause_s=4)

No rounds, names, digests, checks of what comes, retries, saving or HTTP; whoever fails hangs. It is what
`diloco_exchange.py` is held against: what this machine lets an exchange of so many bytes be, in the same run. Its order
is that of an exchange: all encode and send, the server makes its step when both are there, all receive and take in.
"""

import multiprocessing
import socket
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection

import torch
from torch import Tensor

PIECE = 1 << 18
_BYTES = 1 << 20


def pieces(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    return list(zip(*(torch.split(tensor, PIECE) for tensor in tensors), strict=True))


def _send(sock: socket.socket, tensor: Tensor) -> None:
    data = memoryview(tensor.view(torch.uint8).numpy())
    for start in range(0, len(data), _BYTES):
        sock.sendall(data[start : start + _BYTES])


def receive(sock: socket.socket, tensor: Tensor) -> None:
    room, done = memoryview(tensor.view(torch.uint8).numpy()), 0
    while done < len(room):
        done += sock.recv_into(room[done : done + _BYTES])


def outer_step(
    value: Tensor, known: Tensor, moment: Tensor, change: Tensor, sent: Sequence[Tensor], scratch: Tensor
) -> None:
    """SGD with Nesterov of the mean of what was `sent`, and the `change` from what is `known` to its value."""
    mean = scratch[: len(value)]
    mean.copy_(sent[0])
    for one in sent[1:]:
        mean.add_(one)
    mean.div_(len(sent))
    moment.mul_(0.9).add_(mean)
    value.sub_(mean, alpha=0.7).sub_(moment, alpha=0.63)
    change.copy_(torch.sub(value, known, out=mean))
    known.add_(change)


def _work(numel: int, rounds: int, pause_s: float, port: int, said: Connection) -> None:
    torch.set_num_threads(1)
    anchor, local = torch.zeros(numel), torch.full((numel,), 1e-3)
    residual, sent = torch.zeros(numel), torch.zeros(numel, dtype=torch.bfloat16)
    scratch = torch.empty(PIECE)
    seconds = []
    with socket.create_connection(("127.0.0.1", port)) as sock:
        for _ in range(rounds):
            time.sleep(pause_s)
            begun = time.perf_counter()
            for base, now, left, out in pieces(anchor, local, residual, sent):
                left.add_(torch.sub(base, now, out=scratch[: len(base)]))
                out.copy_(left)
                left.sub_(out)
            _send(sock, sent)
            receive(sock, sent)
            for base, now, change in pieces(anchor, local, sent):
                base.add_(change)
                now.copy_(base)
            seconds.append(time.perf_counter() - begun)
    said.send(seconds)


@torch.no_grad()
def _serve(numel: int, workers: int, rounds: int, listening: socket.socket) -> None:
    master, published, momentum = torch.zeros(numel), torch.zeros(numel), torch.zeros(numel)
    change = torch.zeros(numel, dtype=torch.bfloat16)
    came = [torch.zeros(numel, dtype=torch.bfloat16) for _ in range(workers)]
    socks = [listening.accept()[0] for _ in range(workers)]

    def together(call: Callable[[socket.socket, Tensor], None], tensors: Sequence[Tensor]) -> None:
        threads = [threading.Thread(target=call, args=each) for each in zip(socks, tensors, strict=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    gradient = torch.empty(PIECE)
    for _ in range(rounds):
        together(receive, came)
        for value, known, moment, out, *sent in pieces(master, published, momentum, change, *came):
            outer_step(value, known, moment, out, sent, gradient)
        together(_send, [change] * workers)


def hand_exchange_s(megabytes: float, workers: int = 2, rounds: int = 4, pause_s: float = 0.0) -> float:
    """Seconds of such an exchange of a model of so many MB in fp32 over loopback, bf16 both ways; the median.

    `pause_s` is how long nothing is done before each: after four seconds memory is five times slower here, as what was
    in the processor's third cache is others' by then.
    """
    numel = int(megabytes * 1e6 / 4)
    context = multiprocessing.get_context("spawn")
    ends = [context.Pipe() for _ in range(workers)]
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        processes = [context.Process(target=_work, args=(numel, rounds, pause_s, port, end[1])) for end in ends]
        for process in processes:
            process.start()
        _serve(numel, workers, rounds, listening)
        seconds = [end[0].recv() for end in ends]
        for process in processes:
            process.join()
    return max(statistics.median(each[1:]) for each in seconds)


if __name__ == "__main__":
    print(f"{hand_exchange_s(400):.2f} s")
