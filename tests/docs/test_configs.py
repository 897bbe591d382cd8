"""Every config that is shipped passes the check that `forgather check --all` makes, and has a description."""

from pathlib import Path

import pytest

from forgather import Project
from forgather.config.files import list_configs
from tests.docs.pages import ROOT

PROJECTS = sorted(path.parent for path in (ROOT / "configs").rglob("project.yaml"))
CONFIGS = [(project, summary.name) for project in PROJECTS for summary in list_configs(project)]


def test_there_are_some():
    assert len(CONFIGS) > 5


@pytest.mark.parametrize(("project", "name"), CONFIGS, ids=[f"{p.relative_to(ROOT)}:{n}" for p, n in CONFIGS])
def test_a_shipped_config_checks(project: Path, name: str):
    required = [p.name for p in Project(project, name).parameters.values() if p.is_required]
    config = Project(project, name, args=dict.fromkeys(required, "stand-in"))  # they are paths and names
    config.check()
    assert config.description
