"""`forgather model construct`: writes the package of a model that a config has composed, constructs it, and reports."""

import json
from typing import TYPE_CHECKING

from forgather.cli.model_loading import Constructed, check_flags, construct_model
from forgather.cli.options import Options
from forgather.cli.output import Output
from forgather.errors import EXIT_OK

if TYPE_CHECKING:
    from forgather.models.explain_init import Explained


def run(options: Options) -> int:
    """Print the report of the constructed model; weights are saved where asked."""
    output = Output(options.output_file, edit=options.edit, name=options.project.config_name.replace("/", "-"))
    constructed = construct_model(options, check_flags(options), refuse_stale=False)
    output.write(_json(constructed, options) if options.json else _text(constructed, options))
    output.close()
    return EXIT_OK


def _text(constructed: Constructed, options: Options) -> str:
    from forgather.models.report import report

    model, package = constructed.model, constructed.package
    stale = ""
    if constructed.differences:
        title = "Stale: this is the package on disk, not what the configuration says"
        lines = [title, "-" * len(title), *constructed.differences, "", ""]
        stale = "\n".join(lines)
    text = report(
        model, package.tokenizer, explained=_explained(constructed, options), fused=options.fuse_optim_with_backward
    )
    return stale + text.strip("\n")


def _json(constructed: Constructed, options: Options) -> str:
    from forgather.models.report import facts

    said = facts(
        constructed.model,
        constructed.package.tokenizer,
        explained=_explained(constructed, options),
        fused=options.fuse_optim_with_backward,
    )
    where = {
        "package": str(constructed.package.dir),
        "stale": constructed.differences,
        "weights": [str(path) for path in constructed.saved],
    }
    return json.dumps(where | said, indent=2)


def _explained(constructed: Constructed, options: Options) -> list["Explained"]:
    if not options.explain_init:
        return []
    from forgather.models.construct import load_classes
    from forgather.models.explain_init import explain_init

    return explain_init(constructed.model, load_classes(constructed.package.dir).init_rules)
