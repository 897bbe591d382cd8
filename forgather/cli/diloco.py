"""`forgather diloco`: one model trained over a network of unequal machines; each verb has a module of its own."""

from forgather.cli import diloco_operate, diloco_plan, diloco_server, diloco_worker
from forgather.cli.options import Options
from forgather.cli.parser import CommandParser

SUMMARY = "Train one model over a network of unequal machines"
NEEDS_CONFIG = False


def configure(parser: CommandParser) -> None:
    """The verbs, each with its flags."""
    diloco_server.add_server(parser)
    diloco_worker.add_worker(parser)
    diloco_operate.add_status(parser)
    diloco_operate.add_control(parser)
    diloco_operate.add_cert(parser)
    diloco_operate.add_package(parser)
    diloco_plan.add_plan(parser)


def run(options: Options) -> int:
    """Run the verb; its exit code."""
    verbs = {
        "server": diloco_server.run,
        "worker": diloco_worker.run_without_train,
        "status": diloco_operate.status,
        "control": diloco_operate.control,
        "cert": diloco_operate.cert,
        "package": diloco_operate.package,
        "plan": diloco_plan.run,
    }
    return verbs[options.verb or ""](options)
