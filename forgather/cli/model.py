"""`forgather model`: the flags of its verbs; each verb is a module of its own."""

import math
from argparse import ArgumentTypeError
from collections.abc import Callable

from forgather.cli import model_construct, model_test
from forgather.cli.options import Options
from forgather.cli.parser import CommandParser

SUMMARY = "Construct or test a model"
NEEDS_CONFIG = True
TARGETS = ("hf_config", "tokenizer", "package")

ATTENTION = ("eager", "sdpa", "flash_attention_2", "flex_attention")


def configure(parser: CommandParser) -> None:
    """Flags of the command itself stand before or after the verb."""
    parser.add_argument("--device", default="meta", help="Device to construct model on (default: meta)")
    parser.add_argument("--dtype", help="Construct with this dtype of parameters (e.g., bfloat16, float32)")
    parser.add_argument(
        "--no-init-weights", action="store_true", help="Construct without drawing weights: they are undefined"
    )
    parser.add_argument(
        "--load-from-checkpoint",
        metavar="LOAD_FROM_CHECKPOINT",
        help="Load model weights from checkpoint (path): a checkpoint, a run, a Hugging Face folder or a file; what it "
        "lacks is named in a warning",
    )
    parser.add_argument("--gradient-checkpointing", action="store_true", help="Enable gradient checkpointing")
    parser.add_argument(
        "--fuse-optim-with-backward",
        action="store_true",
        help="Combine backward with optimizer step to save memory",
    )
    parser.add_argument(
        "--refresh-model",
        "-r",
        action="store_true",
        help="Force regeneration of the model's definition from sources; weights, checkpoints and runs beside it are "
        "never deleted",
    )
    parser.add_argument(
        "--save-checkpoint",
        action="store_true",
        help="Save model weights beside the definition, as constructed or loaded",
    )
    parser.add_argument(
        "--safetensors", action="store_true", help="Accepted, and changes nothing: weights are always safetensors"
    )
    parser.add_argument("-o", "--output-file", help="Write output to file")
    parser.add_argument(
        "-e",
        "--edit",
        action="store_true",
        help="Write output to temporary file, or that of -o, and open in editor: $VISUAL, $EDITOR or vi; an error "
        "without a terminal",
    )
    parser.add_argument(
        "--attn-implementation",
        choices=ATTENTION,
        help="Attention implementation (default: sdpa, or eager where a part knows no sdpa)",
    )
    parser.add_argument("--json", action="store_true", help="Write output as JSON: one object, or one a step of `test`")

    construct = parser.add_verb("construct", "Construct a model")
    construct.add_argument(
        "--explain-init", action="store_true", help="Show the rule that gives each parameter its first values"
    )

    test = parser.add_verb("test", "Test model forward and backward")
    test.add_argument("--batch-size", type=_count(1), default=2, help="Batch size (default: 2)")
    test.add_argument("--sequence-length", type=_count(2), default=512, help="Sequence length (default: 512)")
    test.add_argument("--steps", type=_count(1), default=1, help="Number of train steps (default: 1)")
    test.add_argument("--dataset-project", help="Path to dataset project (default: random tokens)")
    test.add_argument("--dataset-config", help="Dataset config name")
    test.add_argument("--packed", action="store_true", help="Enable packed sequences in data collator")
    test.add_argument("--lr", type=_rate, default=0.01, help="Learning rate (default: 0.01)")


def run(options: Options) -> int:
    """Run the verb; its exit code."""
    return {"construct": model_construct.run, "test": model_test.run}[options.verb or ""](options)


def _count(least: int) -> Callable[[str], int]:
    def count(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise ArgumentTypeError(f"{text!r} is not a number of {least} or more")
        return int(text)

    return count


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    if not (math.isfinite(rate) and rate >= 0):
        raise ArgumentTypeError(f"{text!r} is not a learning rate of 0 or more")
    return rate
