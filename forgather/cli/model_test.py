"""`forgather model test`: kicks a model to see if it falls over, with a few steps of SGD."""

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from typing import TYPE_CHECKING, Any

from forgather.cli.model_loading import Constructed, check_flags, construct_model
from forgather.cli.options import Options
from forgather.cli.output import Output
from forgather.cli.terminal import print_warning
from forgather.config.project import Project
from forgather.errors import EXIT_INTERNAL, EXIT_OK, ConfigError, ModelError

if TYPE_CHECKING:
    from forgather.trainers.trial import TrialStep


def run(options: Options) -> int:
    """Print a line for each step; the exit code is 1 when a number was not finite."""
    output = Output(
        options.output_file, edit=options.edit, name=f"{options.project.config_name.replace('/', '-')}-test"
    )
    if options.no_init_weights and options.load_from_checkpoint is None and options.device != "meta":
        raise ModelError(
            "--no-init-weights: undefined weights test nothing",
            fix="leave it out, or load weights with --load-from-checkpoint PATH",
        )
    if options.dataset_config is not None and options.dataset_project is None:
        raise ModelError("--dataset-config names a config of no project", fix="add --dataset-project PATH")
    choice = check_flags(options)
    from forgather.models.attention_support import require_training
    from forgather.trainers.trial import try_training

    require_training(options.attn_implementation, choice.device, choice.dtype)
    dataset = None if options.dataset_project is None else _dataset_project(options)
    constructed = construct_model(options, choice, refuse_stale=True)
    batches = _batches(options, constructed, dataset)
    _warn_of_length(options, constructed)
    steps = try_training(
        constructed.model,
        islice(batches, options.steps),
        lr=options.lr,
        fuse=options.fuse_optim_with_backward,
    )
    problem = None
    for step in steps:
        output.write(_json(step) if options.json else _line(step))
        if step.step == 1 and step.without_gradient:
            print_warning(f"no gradient reached {', '.join(step.without_gradient)}")
        problem = step.problem
    if problem is None and not options.json:
        output.write(_completed(options, constructed))
    output.close()
    if problem is not None:
        print(f"test failed: {problem}", file=sys.stderr)
        return EXIT_INTERNAL
    return EXIT_OK


def _dataset_project(options: Options) -> Project:
    """Read before the model is constructed, as what is wrong with its name is cheap to find."""
    try:
        project = Project(options.dataset_project, options.dataset_config)
    except ConfigError as error:
        raise ConfigError(
            f"--dataset-project: {error.message}", fix="name a dataset project; `forgather ls -r` lists projects"
        ) from error
    if not project.has("train"):
        raise ConfigError(
            f"--dataset-project: config {project.config_name!r} of {project.dir} has no target `train`",
            fix="name a dataset project; `forgather ls -r` lists projects",
        )
    return project


def _batches(options: Options, constructed: Constructed, dataset: Project | None) -> "Iterator[dict[str, Any]]":
    from forgather.data.tokenizers import tokenizer_digest
    from forgather.trainers.trial_batches import document_batches, packed_batches, random_batches

    shape = {"rows": options.batch_size, "length": options.sequence_length}
    if dataset is None:
        return random_batches(constructed.model.config.vocab_size, packed=options.packed, **shape)
    tokenizer = constructed.package.tokenizer
    shards = dataset.build("train", given={"tokenizer": tokenizer})
    shards.require_tokenizer(tokenizer_digest(tokenizer))
    return (packed_batches if options.packed else document_batches)(shards, **shape)


def _warn_of_length(options: Options, constructed: Constructed) -> None:
    longest = getattr(constructed.model.config, "max_position_embeddings", None)
    if longest is not None and options.sequence_length > longest:
        print_warning(
            f"--sequence-length {options.sequence_length} is more than the model's max_position_embeddings {longest}"
        )


def _json(step: "TrialStep") -> str:
    """JSON knows no NaN: a number that is not finite is null, and `problem` says what it was."""
    numbers = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in asdict(step).items()
    }
    return json.dumps(numbers, allow_nan=False)


def _line(step: "TrialStep") -> str:
    """`step 1  loss 7.6214  grad norm 2.110  logits [2, 512, 2000]  10,431 tokens/s  peak memory 612.21 MiB`."""
    from forgather.models.report import bytes_text

    cells = [f"step {step.step}"]
    if step.loss is not None:
        cells.append(f"loss {step.loss:.4f}")
    if step.grad_norm is not None:
        cells.append(f"grad norm {step.grad_norm:.3f}")
    cells.append(f"logits {list(step.logits_shape)}")
    if step.tokens_per_s is not None:
        cells.append(f"{step.tokens_per_s:,.0f} tokens/s")
    if step.peak_memory_bytes is not None:
        cells.append(f"peak memory {bytes_text(step.peak_memory_bytes)}")
    return "  ".join(cells)


def _completed(options: Options, constructed: Constructed) -> str:
    parameter = next(constructed.model.parameters())
    attention = constructed.model.config._attn_implementation
    where = f"{parameter.device}, {str(parameter.dtype).removeprefix('torch.')}, {attention} attention"
    what = "shapes of forward and backward fit" if parameter.is_meta else "forward and backward work"
    return f"test completed: {what} ({options.steps} {'step' if options.steps == 1 else 'steps'} on {where})"
