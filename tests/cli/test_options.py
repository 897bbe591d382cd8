"""The parameters that a config declares are flags like any other, wherever they stand."""

import re

import pytest

from forgather.cli.options import read_options
from forgather.config.files import shipped_configs


@pytest.fixture
def show(forgather):
    """What `main` says when `forgather show main` is given these words."""

    def run(*arguments):
        done = forgather("show", "main", *arguments)
        assert done.code == 0, done.err
        return done.out

    return run


def test_help_shows_declared_parameters_in_order_of_declaration(forgather):
    for arguments in (["show", "--help"], ["-t", "train", "show", "-h"], ["show", "--help", "--lr", "3"]):
        text = forgather(*arguments).out
        section = text[text.index("Dynamic arguments") :]
        flags = re.findall(r"^  (--[\w-]+)", section, re.MULTILINE)
        declared = ["--hidden-size", "--window", "--steps", "--lr", "--tie", "--mode", "--options", "--out"]
        assert flags[: len(declared)] == declared
        flat = " ".join(section.split())
        assert "Model hidden dimension size (d_model), 100% of it (default: 512)" in flat
        assert "Sliding window size. 'null' for disabled (default: null)" in flat
        assert "--tie, --no-tie Tie embeddings (default: false)" in flat
        assert "--mode {fast,slow}" in flat
        assert "(default: {a: 1})" in flat
        assert "(default: 0.0003)" in flat


def test_help_works_when_the_config_is_broken_and_says_so(broken, forgather):
    done = forgather("show", "-t", "broken", "--help")
    assert done.code == 0
    assert "--origin" in done.out
    assert "Dynamic arguments are missing here, because the config cannot be read" in done.out
    assert "broken.yaml:3:" in done.out


def test_help_works_outside_a_project(forgather, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = forgather("train", "--help")
    assert done.code == 0
    assert "--nproc" in done.out
    assert "Dynamic arguments are missing here" in done.out


@pytest.mark.parametrize(
    "arguments",
    [
        ["show", "main", "--hidden-size", "64", "--tie"],
        ["show", "--hidden-size=64", "main", "--tie"],
        ["show", "--tie", "--hidden-size", "64", "main"],
        ["show", "--no-tie", "--tie", "--hidden-size", "3", "main", "--hidden-size", "64"],
    ],
)
def test_declared_flags_stand_anywhere(arguments, forgather):
    done = forgather(*arguments)
    assert done.code == 0, done.err
    assert "hidden_size: 64" in done.out
    assert "tie: true" in done.out


def test_declared_flags_have_their_types(show):
    text = show("--window", "7", "--lr=-1e-3", "--mode", "slow", "--options", "{b: [1, 2]}", "--steps", "9")
    for line in ("window: 7", "lr: -0.001", "mode: slow", "steps: 9"):
        assert line in text
    assert "b:" in text
    assert "a: 1" not in text
    assert "window: null" in show("--window", "null")


def test_a_path_flag_is_relative_to_the_working_directory(show, project, monkeypatch):
    monkeypatch.chdir(project / "configs")
    assert f"out: {project / 'configs' / 'here'}" in show("--out", "here")


def test_words_override_values_and_stand_anywhere(forgather):
    done = forgather("show", "main.steps=7", "main", "main.extra={x: 1}", "--lr", "1")
    assert done.code == 0, done.err
    assert "steps: 7" in done.out
    assert "x: 1" in done.out


@pytest.mark.parametrize("before", [True, False])
def test_the_selection_stands_before_or_after_the_command(before, forgather, project, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    selection = ["-p", "demo", "-t", "train.yaml"]
    done = forgather(*selection, "targets") if before else forgather("targets", *selection)
    assert done.code == 0, done.err
    assert done.out.split() == ["main", "environment", "numbers", "total"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["show", "--hiden-size", "3"], "did you mean --hidden-size?"),
        (["show", "--orgin"], "did you mean --origin?"),
        (["show", "--hidden", "3"], "unknown flag '--hidden' of `forgather show`"),
        (["show", "-t", "trian"], "train"),
        (["show", "--hidden-size", "x"], "hidden_size"),
        (["show", "--hidden-size", "0"], "at least 1"),
        (["show", "--mode", "medium"], "fast"),
        (["show", "mian.steps=3"], "did you mean 'main'?"),
        (["show", "mian"], "main"),
        (["show", "-p", "nowhere"], "nowhere"),
    ],
)
def test_a_wrong_name_or_value_is_a_user_error_that_says_what_would_work(arguments, said, forgather):
    done = forgather(*arguments)
    assert done.code == 2
    assert done.err.startswith("error: ")
    assert said in done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize("name", ["project", "config", "help", "origin", "format", "nproc", "dry_run", "all"])
def test_a_parameter_that_would_hide_a_flag_is_refused_with_its_place(name, forgather, project):
    path = project / "configs" / "train.yaml"
    path.write_text(path.read_text().replace("  steps: 300\n", f"  steps: 300\n  {name}: 1\n"))
    for command in ("show", "targets"):
        done = forgather(command)
        assert done.code == 2
        assert "train.yaml:6:3: parameter" in done.err or "reserved" in done.err


def test_a_parameter_may_be_named_as_a_flag_of_a_command_for_other_kinds(forgather, project):
    path = project / "configs" / "train.yaml"
    path.write_text(path.read_text().replace("  steps: 300\n", "  steps: 300\n  device: cpu\n  batch_size: 3\n"))
    assert forgather("show", "--device", "cuda").code == 0


def test_a_config_of_another_kind_is_told_so(forgather):
    for arguments in (["model", "construct"], ["model", "--hidden-size", "3", "construct"], ["dataset", "prepare"]):
        done = forgather(*arguments)
        assert done.code == 2
        assert "is of another kind" in done.err


def test_verbs_take_shared_flags_on_either_side():
    for tokens in (
        ["--device", "cpu", "construct", "-r", "-o", "x"],
        ["construct", "--device", "cpu", "-rox"],
        ["-r", "-ox", "--device=cpu", "construct"],
    ):
        options = read_options("model", tokens, argv=tokens)
        assert (options.verb, options.device, options.refresh_model, options.output_file) == (
            "construct",
            "cpu",
            True,
            "x",
        )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["model", "constrct"], "did you mean construct?"),
        (["model"], "no verb given to `forgather model`"),
        (["dataset", "prepare", "--verify"], "--verify is a flag of `forgather dataset inspect`"),
    ],
)
def test_a_wrong_verb_is_a_user_error(arguments, said, forgather):
    done = forgather(*arguments)
    assert done.code == 2
    assert said in done.err


def test_a_wrong_flag_before_the_verb_is_named_and_not_its_value(forgather):
    llama = shipped_configs() / "models" / "llama"
    done = forgather("model", "-p", str(llama), "--hiden-size", "128", "construct")
    assert done.code == 2
    assert "unknown flag '--hiden-size'" in done.err
    assert "did you mean --hidden-size?" in done.err


def test_verb_help_shows_its_own_flags_and_the_shared_ones(forgather):
    text = forgather("dataset", "inspect", "--help").out
    assert text.startswith("usage: forgather dataset [flags] inspect")
    assert "--documents" in text
    assert "--documents" not in forgather("dataset", "prepare", "--help").out
    assert "inspect" in forgather("dataset", "--help").out


def test_two_parameters_with_one_flag_are_refused_with_the_place(project, forgather):
    config = project / "configs" / "train.yaml"
    config.write_text(config.read_text().replace("  steps: 300\n", "  steps: 300\n  no_tie: 1\n"))
    for arguments in (["show"], ["show", "--no-tie"], ["check"]):
        done = forgather(*arguments)
        assert done.code == 2
        assert "train.yaml:8:3: parameters 'no_tie' and 'tie' would both be --no-tie" in done.err
    assert "would both be --no-tie" in forgather("show", "--help").out


def test_a_nullable_switch_has_a_flag_that_makes_it_null(project, forgather):
    config = project / "configs" / "train.yaml"
    config.write_text(config.read_text().replace("tie: {type: bool,", "tie: {type: bool?,"))
    for flag, value in (("--tie=null", "null"), ("--no-tie", "false"), ("--tie", "true")):
        done = forgather("show", flag, "main")
        assert f"tie: {value}" in done.out, done.err
    assert "--tie=null" in forgather("show", "--help").out
    assert "--tie takes no value" in forgather("show", "--tie=maybe").err


def test_a_parameter_whose_name_begins_with_an_underscore_is_refused(project, forgather):
    config = project / "configs" / "train.yaml"
    config.write_text(config.read_text().replace("  steps: 300\n", "  steps: 300\n  _p: 1\n"))
    done = forgather("show")
    assert done.code == 2
    assert "train.yaml:6:3: the parameter '_p' begins with _" in done.err
