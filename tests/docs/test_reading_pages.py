"""The reader of pages sees blocks, links and commands as a reader does."""

import pytest

from tests.docs.pages import ROOT, Page, forgather_arguments, shell_commands

TEXT = """# A page: *first*

See [the index](docs/README.md#top), [outside](https://example.org) and `forgather/errors.py`, `forgather/<name>`.
Then `forgather train` goes on.

```bash run
forgather ls   # `forgather/never/checked.py`
```

````markdown
```python run
not a block of its own
```
````

```
plain
```
"""


@pytest.fixture
def page(tmp_path) -> Page:
    (tmp_path / "page.md").write_text(TEXT)
    return Page(tmp_path / "page.md")


def test_blocks(page):
    blocks = list(page.blocks())
    assert [(block.language, block.is_run, block.line) for block in blocks] == [
        ("bash", True, 7),
        ("markdown", False, 11),
        ("", False, 17),
    ]
    assert blocks[0].text.startswith("forgather ls")


def test_neighbours_of_one_language_are_one_program(tmp_path):
    fences = [("python run", "a = 1"), ("bash", "ls"), ("python run", "print(a)"), ("bash run", "ls"), ("yaml", "a: 1")]
    (tmp_path / "page.md").write_text("\n".join(f"```{words}\n{text}\n```" for words, text in fences))
    programs = list(Page(tmp_path / "page.md").programs())
    assert [(block.language, block.text.split()) for block in programs] == [
        ("python", ["a", "=", "1", "print(a)"]),
        ("bash", ["ls"]),
    ]


def test_prose(page):
    assert list(page.links()) == ["docs/README.md#top"]
    assert list(page.named_paths()) == ["forgather/errors.py"]
    assert list(page.inline_commands()) == ["forgather train"]
    assert page.anchors() == {"a-page-first"}


def test_an_open_fence_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr("tests.docs.pages.ROOT", tmp_path)
    (tmp_path / "page.md").write_text("```bash\nls\n")
    with pytest.raises(AssertionError, match="never closed"):
        list(Page(tmp_path / "page.md").blocks())


def test_shell_commands_are_split_as_a_shell_does():
    text = (
        'cd x && OMP_NUM_THREADS=1 forgather train lr=1e-3 \\\n  steps=20 > log 2>&1 | tee "a b" # why\n\n# comment\n'
    )
    assert list(shell_commands(text)) == [
        ["cd", "x"],
        ["forgather", "train", "lr=1e-3", "steps=20"],
        ["tee", "a b"],
    ]


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("forgather -p x train", ["-p", "x", "train"]),
        (".venv/bin/forgather ls", ["ls"]),
        ("torchrun --nproc-per-node 2 -m forgather -p x train", ["-p", "x", "train"]),
        ("python -m forgather ls", ["ls"]),
        ("make demo", None),
    ],
)
def test_the_arguments_of_forgather(command, arguments):
    assert forgather_arguments(command.split()) == arguments


def test_the_root_is_the_repository():
    assert (ROOT / "pyproject.toml").is_file()
