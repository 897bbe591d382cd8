"""Projects, workspaces, the library, configs by name, and where outputs go."""

from collections.abc import Callable
from pathlib import Path

import pytest

from forgather import Project
from forgather.config import find_project, list_configs, shipped_configs
from forgather.config.files import output_folder, read_project
from forgather.errors import ConfigError

Write = Callable[..., Path]


def test_the_nearest_project_above_is_found(write: Write):
    root = write({"deep/er/x.txt": ""}, main="main: 1")
    assert find_project("deep/er") == root
    assert Project("deep/er").dir == root
    with pytest.raises(ConfigError, match="no folder depe"):
        find_project("depe")


def test_no_project_says_how_to_make_one(tmp_path: Path):
    with pytest.raises(ConfigError, match="forgather project new"):
        find_project(tmp_path)


def test_the_library_is_the_projects_then_the_workspaces_then_the_standard_one(write: Write):
    root = write(
        {
            "workspace.yaml": "library: [shared]",
            "shared/a.yaml": "main: workspace",
            "shared/b.yaml": "main: workspace",
            "inner/project.yaml": "library: own\ndefault: main",
            "inner/own/a.yaml": "main: project",
            "inner/configs/main.yaml": "extends: lib:a.yaml",
            "inner/configs/other.yaml": "extends: lib:b.yaml",
        }
    )
    assert Project("inner").build("main") == "project"
    assert Project("inner", "other").build("main") == "workspace"
    library = read_project(root / "inner").library
    assert library == (root / "inner/own", root / "shared", shipped_configs() / "lib", shipped_configs())


def test_shipped_configs_hold_the_standard_library():
    assert (shipped_configs() / "lib").is_dir()


def test_list_configs_tells_what_is_broken_and_goes_on(write: Write):
    write({"configs/sub/c.yaml": "description: deep"}, main="description: The main one\nmain: 1", b="a: yes")
    rows = list_configs(".")
    assert [(row.name, row.description, row.is_default) for row in rows] == [
        ("b.yaml", "", False),
        ("main.yaml", "The main one", True),
        ("sub/c.yaml", "deep", False),
    ]
    assert "configs/b.yaml:1:4" in str(rows[0].error)
    assert rows[1].error is None
    assert Project(".", "sub/c").config_name == "sub/c"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("nmae: x", "project.yaml:1:1: unknown key 'nmae'\n  fix: did you mean 'name'?"),
        ("library: [absent]", "project.yaml:1:11: no folder absent"),
        ("library: [1]", "library names folders"),
        ("name: [1]", "'name' must be text"),
        ("default: mian", "project.yaml:1:1: the project"),
        ("[1]", "project.yaml must be a mapping"),
    ],
)
def test_project_files_that_are_refused(write: Write, settings: str, said: str):
    write({"project.yaml": settings}, main="main: 1", other="main: 2")
    with pytest.raises(ConfigError) as caught:
        Project(".")
    assert said in str(caught.value)


def test_no_default_names_the_choices(write: Write):
    write({"project.yaml": ""}, a="main: 1", b="main: 2")
    with pytest.raises(ConfigError, match="choose one with -t: a, b"):
        Project(".")


def test_a_single_config_is_the_default(write: Write):
    root = write({"project.yaml": ""}, only="main: 1")
    assert Project(".").config_name == "only"
    assert Project(".").name == root.name


def test_outputs_go_under_a_writable_project_and_never_into_an_installation(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    root = write({"here/x": ""}, main="main: ${project.output}")
    assert Project(".").build("main") == str(root)
    installed = root / "lib/site-packages/forgather/configs/p"
    installed.mkdir(parents=True)
    monkeypatch.chdir(root / "here")
    assert output_folder(installed) == root / "here"


def test_project_output_of_an_inner_project_is_the_outermost_ones(write: Write):
    root = write(
        {
            "inner/project.yaml": "name: inner",
            "inner/configs/a.yaml": "main:\n- ${project.output}\n- ${project.dir}\n- ${config.name}",
        },
        main="_p: !project {dir: ../inner}\nmain: !ref _p.main",
    )
    assert Project(".").build("main") == [str(root), str(root / "inner"), "a"]


def test_lib_names_projects_and_files(write: Write):
    write(
        {
            "shelf/tool/project.yaml": "",
            "shelf/tool/configs/a.yaml": "main: 5",
            "shelf/words.txt": "",
            "shelf/parts.py": "def f():\n    return 7\n",
            "project.yaml": "library: [shelf]\ndefault: main",
        },
        main="""
        args: {words: {type: path, default: lib:words.txt}}
        _p: !project {dir: lib:tool}
        main: !singleton:dict
          p: !ref _p.main
          words: ${words}
          again: ${path('lib:words.txt')}
          f: !singleton:lib:shelf.py:f
        """.replace("lib:shelf.py", "lib:parts.py"),
    )
    made = Project(".").build("main")
    assert made["p"] == 5
    assert made["f"] == 7
    assert made["words"] == made["again"] == str(Path.cwd() / "shelf/words.txt")


def test_a_config_is_no_project_and_the_default_is_not_taken_for_it(write: Write):
    write(main="a: 1", other="a: 2")
    with pytest.raises(ConfigError, match=r"other.yaml is a file.*\n  fix: write -p configs -t other"):
        find_project("configs/other.yaml")
    assert find_project("project.yaml") == find_project(".")
