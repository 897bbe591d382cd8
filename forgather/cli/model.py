"""`forgather model construct`: writes the package of a model that a config has composed, and constructs it."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from forgather.cli.options import Options
from forgather.cli.parser import CommandParser
from forgather.cli.terminal import print_warning
from forgather.errors import EXIT_OK, ModelError

if TYPE_CHECKING:
    import torch

SUMMARY = "Construct or test a model"
NEEDS_CONFIG = True
TARGETS = ("hf_config", "tokenizer", "package")

DTYPES = {
    "float32": "float32",
    "float": "float32",
    "fp32": "float32",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float16": "float16",
    "half": "float16",
    "fp16": "float16",
    "float64": "float64",
    "double": "float64",
}


def configure(parser: CommandParser) -> None:
    """The flags stand before or after the verb."""
    parser.add_argument("--device", default="meta", help="Device to construct model on (default: meta)")
    parser.add_argument("--dtype", help="Construct with this dtype of parameters (e.g., bfloat16, float32)")
    parser.add_argument("--no-init-weights", action="store_true", help="Leave the weights undefined")
    parser.add_argument(
        "--refresh-model",
        "-r",
        action="store_true",
        help="Regenerate the model's definition from sources; checkpoints, weights and runs stay",
    )
    parser.add_argument("--save-checkpoint", action="store_true", help="Save the weights with the model's definition")
    parser.add_argument("--safetensors", action="store_true", help="Accepted; weights are always safetensors")
    parser.add_argument("-o", "--output-file", help="Write output to file")
    parser.add_argument(
        "--attn-implementation", choices=["eager", "sdpa"], default="sdpa", help="Attention implementation"
    )
    parser.add_verb("construct", "Construct a model")


def run(options: Options) -> int:
    """Write the package, construct the model, save its weights where asked, and print what came out."""
    on_meta = options.device == "meta"
    if options.save_checkpoint and on_meta:
        raise ModelError("--save-checkpoint: a model on the meta device has no weights", fix="add --device cpu")
    if options.save_checkpoint and options.no_init_weights:
        raise ModelError("--save-checkpoint would save undefined weights", fix="leave out --no-init-weights")
    dtype = None if options.dtype is None else _dtype(options.dtype)
    device = _device(options.device)

    from forgather.models.construct import construct
    from forgather.models.report import report
    from forgather.models.weights import save_weights

    package = options.project.build("package")
    differences = [] if options.refresh_model else package.differences()
    if differences:
        stale = package.stale(differences)
        print_warning(f"{stale.message}; constructing what is there. {stale.fix}")
    else:
        package.write(refresh=options.refresh_model)
    model = construct(
        package.dir,
        device,
        dtype=dtype,
        attn_implementation=options.attn_implementation,
        seed=None if options.no_init_weights else 0,
    )
    saved = save_weights(model, package.dir) if options.save_checkpoint else []

    text = report(model, package.tokenizer)
    if options.output_file is None:
        sys.stdout.write(text.lstrip("\n"))
    else:
        try:
            Path(options.output_file).write_text(text.lstrip("\n"), encoding="utf-8")
        except OSError as error:
            raise ModelError(
                f"--output-file: {options.output_file} cannot be written: {error.strerror}",
                fix="name a file in a folder that is there and can be written",
            ) from error
    print(f"model package: {package.dir}", file=sys.stderr)
    for path in saved:
        print(f"weights: {path}", file=sys.stderr)
    return EXIT_OK


def _dtype(name: str) -> "torch.dtype":
    import torch

    if name.removeprefix("torch.") not in DTYPES:
        raise ModelError(f"--dtype: unknown dtype {name!r}", fix=f"one of: {', '.join(DTYPES)}")
    dtype: torch.dtype = getattr(torch, DTYPES[name.removeprefix("torch.")])
    return dtype


def _device(name: str) -> "torch.device":
    import torch

    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ModelError(f"--device: unknown device {name!r}", fix="meta, cpu, cuda or cuda:0") from error
    if device.type not in ("meta", "cpu"):
        kind = getattr(torch, device.type, None)  # torch.cuda, torch.mps: a module for each kind that this torch knows
        if kind is None or not kind.is_available():
            raise ModelError(
                f"--device: this machine has no {device.type.upper()} device that torch can use", fix="--device cpu"
            )
        if (device.index or 0) >= kind.device_count():
            raise ModelError(
                f"--device: there is no {device}; {device.type} devices here: {kind.device_count()}",
                fix=f"--device {device.type}",
            )
    return device
