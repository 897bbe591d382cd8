"""transformers cuts the model of every project by its plan, and it computes what it did."""

import os
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch

from tests.models.test_project_models import PROJECTS, construct
from tests.ranks import RankPool

TOKENS = torch.arange(3, 23).unsqueeze(0)


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankPool]:
    with RankPool(2) as pool:
        yield pool


def logits_of_cut(folder: Path) -> tuple[torch.Tensor, list[str]]:
    """Runs on a rank: the logits of the model that two ranks share, and the parameters of which this one has a part."""
    from torch.distributed.tensor import DTensor
    from transformers import AutoModelForCausalLM

    os.environ["WORLD_SIZE"] = "2"  # by which transformers counts the ranks
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, tp_plan="auto").eval()
    with torch.no_grad():
        logits = model(TOKENS).logits
    cut = [name for name, parameter in model.named_parameters() if isinstance(parameter, DTensor)]
    return logits.full_tensor() if isinstance(logits, DTensor) else logits, cut


@pytest.mark.parametrize("name", PROJECTS)
def test_two_ranks_compute_what_one_does(name: str, tmp_path: Path, ranks: RankPool) -> None:
    sizes = {"num_key_value_heads": 2} if name == "gemma3" else {}  # one head cannot be cut
    model = construct(name, tmp_path, **sizes).eval()
    for parameter in model.parameters():
        if not parameter.any():  # a bias that every rank added would not show
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "saved")
    names = [key for key, _ in model.named_parameters()]
    plan = [f"{pattern}.weight" for pattern, style in model.tp_plan.items() if "replicated" not in style]
    wanted = [key for key in names if any(fnmatch(key, pattern) for pattern in plan)]
    for logits, cut in ranks.run(logits_of_cut, tmp_path / "saved"):
        torch.testing.assert_close(logits, model(TOKENS).logits, rtol=1e-5, atol=1e-5)
        assert "model.embed_tokens.weight" in wanted
        assert set(wanted) <= set(cut)
