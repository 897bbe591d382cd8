"""A rank that joins its group, adds up with the others, and says by which interface it did."""

import torch
import torch.distributed as dist

from forgather.distributed.environment import Environment

with Environment(device="cpu", timeout_s=60) as environment:
    total = torch.tensor([environment.rank + 1.0])
    dist.all_reduce(total)
    print(f"rank {environment.rank}: sum {total.item():g} over {environment.interface}", flush=True)
