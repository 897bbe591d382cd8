"""The unit of each metric by its name, for the header of the record and the columns of the console."""

UNITS: dict[str, str] = {
    "loss": "nats/token",
    "perplexity": "1",
    "targets": "tokens",
    "grad_norm": "1",
    "lr": "1",
    "tokens_per_s": "tokens/s",
    "step_s": "s",
    "data_wait_s": "s",
    "peak_memory_bytes": "bytes",
    "checkpoint_stall_s": "s",
    "bytes_sent": "bytes",
    "goodput": "1",
    "wall_s": "s",
    "processes": "1",
    "mfu": "1",
    "epoch": "passes over the train tokens",
    # of a DiLoCo server's rounds
    "version": "outer steps of the fragment",
    "num_workers": "workers",
    "tokens": "tokens",
    "contribution_norm": "1",
    "round_s": "s",
    "outer_s": "s",
    "time": "s since 1970-01-01 UTC",
}
