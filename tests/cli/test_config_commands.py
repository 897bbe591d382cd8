"""Each stage of a config can be looked at from the command line, and a broken config hides no other."""

import re
import subprocess
import sys

import pytest

from forgather.config.files import shipped_configs
from forgather.config.project import Project


def test_ls_marks_the_default_and_shows_descriptions(forgather, project):
    (project / "configs" / "other.yaml").write_text("description: Another one\nx: 1\n")
    lines = forgather("ls").out.splitlines()
    assert lines[0].startswith("demo  A project of tests")
    assert lines[1:] == ["    other  Another one", "  * train  Trains nothing at all"]


def test_ls_lists_a_broken_config_with_its_error_and_the_others_still(broken, forgather):
    (broken / "configs" / "syntax.yaml").write_text("main: [1\n")
    (broken / "configs" / "orphan.yaml").write_text("extends: nowhere.yaml\n")
    (broken / "configs" / "twice.yaml").write_text("a: 1\na: 2\n")
    done = forgather("ls")
    assert done.code == 0
    assert done.err == ""
    rows = [line.split()[0] for line in done.out.splitlines()[1:] if line.startswith("    ") and line[4] != " "]
    assert rows == ["broken", "orphan", "syntax", "twice"]
    assert done.out.count("broken: ") == 4
    assert "broken.yaml:3:" in done.out
    assert "nowhere.yaml" in done.out
    assert "* train   Trains nothing at all" in done.out


def test_a_config_that_only_lacks_a_required_parameter_is_not_broken(forgather, project):
    (project / "configs" / "asks.yaml").write_text("args: {text_path: {type: path}}\nx: ${text_path}\n")
    assert "broken" not in forgather("ls").out


def test_ls_finds_projects_below_and_a_broken_one_hides_no_other(forgather, project):
    for name in ("one", "two", ".hidden"):
        (project / "sub" / name / "configs").mkdir(parents=True)
        (project / "sub" / name / "project.yaml").write_text(f"name: {name}\n" if name != "two" else "nmae: two\n")
    done = forgather("ls", "-r")
    assert done.code == 0
    assert [line.split()[0] for line in done.out.splitlines() if line and not line.startswith(" ")] == [
        "demo",
        "one",
        "sub/two",
    ]
    assert "nmae" in done.out
    assert forgather("ls", "-r", "-p", "sub/one/configs").code == 2


def test_every_shipped_project_is_listed_and_none_is_broken(forgather):
    done = forgather("ls", "-r", "-p", str(shipped_configs()))
    assert done.code == 0
    assert "broken" not in done.out


MODEL = """
description: A model
args:
  tie_word_embeddings: false
tokenizer: !singleton:../parts.py:train
  vocab_size: 1000
hf_config:
  rows: !singleton:../parts.py:rows
    - !ref tokenizer
  tie_word_embeddings: ${tie_word_embeddings}
model: !singleton:../parts.py:Model
  config: !ref hf_config
  rows: ${hf_config.rows}
package: null
"""
PARTS = """
from torch import nn
from transformers import PreTrainedModel

def train(vocab_size):
    raise AssertionError("training takes minutes")

def rows(tokenizer):
    return len(tokenizer)

class Model(PreTrainedModel):
    _tied_weights_keys = {"head.weight": "embedding.weight"}

    def __init__(self, config, rows):
        super().__init__(config)
        self.embedding = nn.Embedding(rows, 10)
        self.head = nn.Linear(10, rows, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.embedding

    def get_output_embeddings(self):
        return self.head
"""


def test_ls_shows_the_size_of_configs_that_compose_a_model_and_trains_no_tokenizer_for_it(forgather, project):
    (project / "parts.py").write_text(PARTS)
    (project / "configs" / "model.yaml").write_text(MODEL)
    (project / "configs" / "tied.yaml").write_text(
        "extends: model.yaml\ndescription: A tied one\nargs: {tie_word_embeddings: true}\n"
    )
    done = forgather("ls", "--size")
    assert done.code == 0
    rows = [line.split()[:3] for line in done.out.splitlines()[1:]]
    assert rows == [["model", "20K", "A"], ["tied", "10K", "A"], ["*", "train", "Trains"]]


def test_ls_says_why_a_model_has_no_size(forgather, project):
    (project / "parts.py").write_text(PARTS.replace("super().__init__(config)", "raise ValueError('rows are odd')", 1))
    (project / "configs" / "model.yaml").write_text(MODEL)
    (project / "configs" / "nowhere.yaml").write_text(
        "extends: model.yaml\ntokenizer: !singleton:open\n  - surely/not/here\n"
    )
    done = forgather("ls", "--size")
    assert done.code == 0
    assert "model    broken: rows are odd" in done.out
    assert re.search("nowhere  broken: .*surely/not/here", done.out)
    assert "* train" in done.out


def test_ls_takes_a_folder_as_its_word(forgather, project):
    assert forgather("ls", "-r", "--size", str(project)).out == forgather("ls", "-r", "--size", "-p", str(project)).out
    assert forgather("ls", "lib:models/llama").out.startswith("llama")
    done = forgather("ls", str(project / "nowhere"))
    assert done.code == 2
    assert "nowhere" in done.err


def test_show_says_where_values_come_from(forgather):
    text = forgather("show", "--origin", "--lr", "5").out
    assert "train.yaml:" in text
    assert "base.yaml:" in text
    assert "--lr" in text


def test_show_one_target(forgather):
    assert forgather("show", "numbers").out.split() == ["numbers:", "-", "1", "-", "2", "-", "3"]


@pytest.mark.parametrize(("format", "begins"), [("mermaid", ("graph", "flowchart")), ("dot", ("digraph",))])
def test_graph(format, begins, forgather):
    done = forgather("graph", "--format", format)
    assert done.out.startswith(begins)
    assert "total" in done.out


def test_code_builds_what_construct_builds(forgather):
    source = forgather("code", "total").out
    space = {}
    exec(compile(source, "code", "exec"), space)
    assert space["construct"]() == 6
    assert forgather("construct", "total").out == "6\n"


def test_code_with_inputs(forgather):
    source = forgather("code", "total", "--inputs", "numbers").out
    space = {}
    exec(compile(source, "code", "exec"), space)
    assert space["construct"]([5, 6]) == 11


def test_construct_prints_the_object(forgather):
    done = forgather("construct", "--hidden-size", "9", "main.steps=4")
    assert done.out.startswith("namespace(")
    assert "hidden_size=9" in done.out
    assert "steps=4" in done.out


def test_check_is_silent_about_sound_configs_and_names_what_is_wrong(forgather, project):
    assert forgather("check").out == "train: ok\n"
    (project / "configs" / "bad.yaml").write_text("main: !singleton:types:SimpleNamespac {}\n")
    done = forgather("check", "-t", "bad")
    assert done.code == 2
    assert "bad.yaml:1:7" in done.err
    done = forgather("check", "--all")
    assert done.code == 2
    assert done.out.splitlines() == ["bad: broken", "train: ok"]


def test_check_notes_a_parameter_that_nothing_uses(forgather, project):
    path = project / "configs" / "train.yaml"
    path.write_text(path.read_text().replace("  steps: 300\n", "  steps: 300\n  idle: 1\n"))
    done = forgather("check")
    assert (done.code, done.out) == (0, "train: ok\n")
    assert done.err.startswith("warning: ")
    assert "'idle'" in done.err


def test_check_notes_a_config_without_targets(forgather, project):
    (project / "configs" / "empty.yaml").write_text("")
    done = forgather("check", "-t", "empty")
    assert done.code == 0
    assert "'empty.yaml' has no targets" in done.err or "'empty' has no targets" in done.err


def test_a_main_that_is_no_run_is_of_another_kind(forgather, project):
    (project / "configs" / "other.yaml").write_text("main: {a: 1}\n")
    done = forgather("train", "-t", "other")
    assert done.code == 2
    assert "is of another kind" in done.err
    assert "it has no environment" in done.err


def test_a_project_that_cannot_be_written_is_told_where_its_outputs_go(forgather, project, tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda *_: False)
    monkeypatch.chdir(tmp_path)
    note = f"note: {project} cannot be written, so outputs go below {tmp_path}"
    done = forgather("-p", str(project), "dataset", "prepare", "-t", "train")
    assert note not in done.err, "it has no dataset"
    (project / "configs" / "data.yaml").write_text(
        "prepared: !singleton:types:SimpleNamespace {prepare: !symbol:int }\ntrain: 1\nvalidation: 1\n"
    )
    assert note in forgather("-p", str(project), "-t", "data", "dataset", "prepare").err
    monkeypatch.undo()


def test_a_new_project_where_none_can_be_made_is_told(forgather, project):
    done = forgather("project", "new", "project.yaml/x")
    assert done.code == 2
    assert done.err.startswith("error: cannot make project.yaml/x: ")


def test_a_new_project_passes_every_look_at_it(forgather, project, monkeypatch):
    done = forgather("project", "new", "sub/fresh")
    assert done.code == 0, done.err
    monkeypatch.chdir(project / "sub" / "fresh")
    assert forgather("ls").out.splitlines()[1].startswith("  * train")
    assert "main" in forgather("targets").out.split()
    assert "name: fresh" in (project / "sub" / "fresh" / "project.yaml").read_text()
    assert "lr: 0.01" in forgather("show", "--lr", "0.01").out
    assert "--steps" in forgather("train", "--help").out
    assert not list((project / "sub").glob(".*"))


def test_a_new_project_passes_check(project):
    """In a process of its own: it imports all that a training run does."""
    script = (
        "import sys; from forgather.cli.main import main\n"
        "sys.exit(main(['project', 'new', 'x']) or main(['-p', 'x', 'check']))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=project, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("train: ok\n")


@pytest.mark.parametrize("source", ["tiny_llama", "lib:tokenizers/byte_bpe", str(shipped_configs() / "tiny_llama")])
def test_a_project_can_be_a_copy(source, forgather, project):
    done = forgather("project", "new", "copy", "--from", source)
    assert done.code == 0, done.err
    assert Project(project / "copy").name == "copy"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["demo-2", "--from", "tiny_lama"], "did you mean 'tiny_llama'?"),
        (["configs"], "exists already"),
        (["a b"], "is no name for a project"),
    ],
)
def test_a_project_that_cannot_be_made_leaves_nothing(arguments, said, forgather, project):
    before = sorted(project.iterdir())
    done = forgather("project", "new", *arguments)
    assert done.code == 2
    assert said in done.err
    assert sorted(project.iterdir()) == before


def test_shipped_projects_are_found_from_anywhere(forgather):
    listed = forgather("ls", "-r", "-p", "lib:")
    assert listed.code == 0
    assert "(lib:models/llama)" in listed.out
    assert forgather("-p", "lib:models/llama", "-t", "4M", "targets").code == 0
    assert forgather("ls", "-p", "lib:models/llama").out.startswith("llama")
    done = forgather("ls", "-p", "lib:models/lama")
    assert done.code == 2
    assert "did you mean 'llama'?" in done.err
