"""Norms by pattern are those of the whole tensors, on one rank and on two."""

import math
from pathlib import Path

import pytest
import torch

from forgather.errors import ConfigError
from forgather.metrics.sinks import read_rows
from forgather.trainers.norms import Norms
from tests.ranks import RankPool
from tests.trainers.small_run import make_trainer, write_corpus

PATTERNS = {"attention": "self_attn", "head": r"^lm_head\.", "all": "."}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus")).folder


def train(folder: Path, corpus: Path, every: int = 1, tied: bool = False):
    trainer = make_trainer(folder, corpus, steps=4, tied=tied)
    norms = Norms(trainer.model, trainer.state.optimizer, trainer.mesh, patterns=PATTERNS, every=every)
    by_hand = []
    # The same numbers without the hook's own arithmetic, from inside the step.
    optimizer = trainer.state.optimizer
    optimizer.register_step_pre_hook(lambda *_: by_hand.append(measure(trainer.model, "gradients")))
    optimizer.register_step_post_hook(lambda *_: by_hand[-1].update(measure(trainer.model, "parameters")))
    trainer.hooks = type(trainer.hooks)({"norms": norms})
    trainer.run()
    trainer.checkpoints.run.close()
    return read_rows(trainer.checkpoints.run.logs / "metrics.jsonl", "train"), by_hand


def measure(model: torch.nn.Module, of: str) -> dict[str, float]:
    found = {}
    for title, part in (("attention", "self_attn"), ("head", "lm_head"), ("all", "")):
        chosen = [p for name, p in model.named_parameters() if part in name]
        tensors = [p.grad if of == "gradients" else p.detach() for p in chosen]
        whole = [t.full_tensor() if hasattr(t, "full_tensor") else t for t in tensors]
        found[f"norms/{of}/{title}"] = math.sqrt(sum(t.double().square().sum().item() for t in whole))
    return found


def test_norms_are_those_of_the_whole_tensors(tmp_path, corpus):
    rows, by_hand = train(tmp_path / "one", corpus)
    assert len(rows) == len(by_hand) == 4
    for row, expected in zip(rows, by_hand, strict=True):
        assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-5)
        assert row["norms/gradients/all"] == pytest.approx(min(row["grad_norm"], 1.0), rel=1e-4)  # after clipping


def test_two_ranks_have_the_norms_of_one(tmp_path, corpus):
    one, _ = train(tmp_path / "one", corpus)
    with RankPool(2) as pool:
        (rows, _), _ = pool.run(train, tmp_path / "two", corpus)
    names = [name for name in one[0] if name.startswith("norms/")]
    assert len(names) == 6
    for two, expected in zip(rows, one, strict=True):
        assert [two[name] for name in names] == pytest.approx([expected[name] for name in names], rel=1e-5)


def test_a_log_step_shows_the_newest_measurement(tmp_path, corpus):
    rows, by_hand = train(tmp_path, corpus, every=2)
    assert "norms/gradients/all" not in rows[0]
    shown = [row["norms/gradients/all"] for row in rows[1:]]
    assert shown == pytest.approx([by_hand[step - 1]["norms/gradients/all"] for step in (2, 2, 4)], rel=1e-5)


def test_a_pattern_that_finds_nothing_is_refused(tmp_path, corpus):
    trainer = make_trainer(tmp_path, corpus, steps=2)
    place = (trainer.model, trainer.state.optimizer, trainer.mesh)
    with pytest.raises(ConfigError, match=r"the pattern 'conv' is found in no parameter's name") as error:
        Norms(*place, patterns={"convolutions": "conv"})
    assert "model.embed_tokens.weight" in error.value.fix
    with pytest.raises(ConfigError, match="no regular expression"):
        Norms(*place, patterns={"broken": "("})
    with pytest.raises(ConfigError, match="norms are of"):
        Norms(*place, patterns={"all": "."}, of=["updates"])
    trainer.checkpoints.run.close()
