"""What transformers makes of a package where there is no Forgather, and what the documentation writes in Python."""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from forgather.models.package import Package
from tests.models.example import package
from tests.models.test_project_models import PROJECTS, construct

# Runs where nothing but torch, transformers and what these require is installed. transformers.Trainer is used as its
# documentation says; accelerate is what transformers[torch] adds for it.
ELSEWHERE = """
import json, sys
import torch
from importlib.util import find_spec
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

model_path, saved, *projects = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(model_path, trust_remote_code=True)
config = AutoConfig.from_pretrained(model_path, trust_remote_code=True)
torch.manual_seed(0)
model = AutoModelForCausalLM.from_config(config)
found = {"std": {name: parameter.std().item() for name, parameter in model.named_parameters()}}
model.eval()
inputs = tokenizer("that this", return_tensors="pt").input_ids
logits = model(inputs).logits
model.save_pretrained(model_path)
model.save_pretrained(saved)
again = AutoModelForCausalLM.from_pretrained(model_path, trust_remote_code=True)
copied = AutoModelForCausalLM.from_pretrained(saved, trust_remote_code=True)
trunk = AutoModel.from_pretrained(saved, trust_remote_code=True)
found["equal"] = [torch.equal(other(inputs).logits, logits) for other in (again, copied)]

found["projects"] = []
for path in projects:
    model_of_project = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
    tokens = torch.arange(3, 23).unsqueeze(0)
    found["projects"].append(torch.equal(model_of_project(tokens).logits, torch.load(path + "/logits.pt")))

tokenizer.padding_side = "left"
padded = tokenizer(["that this", "the hat that was there"], return_tensors="pt", padding=True)
greedy = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
prompt = padded.input_ids[1:]
found["generated"] = {
    cache: model.generate(prompt, **greedy, **options)[0].tolist()
    for cache, options in {
        "none": {"use_cache": False},
        "dynamic": {},
        "static": {"cache_implementation": "static"},
    }.items()
}
length = len(inputs[0])
alone = model.generate(inputs, **greedy)[0, length:]
found["padded"] = [
    torch.equal(model.generate(**padded, **greedy, **options)[0, padded.input_ids.shape[1]:], alone)
    for options in ({"use_cache": False}, {}, {"cache_implementation": "static"})
]
found["paddings"] = int((padded.attention_mask == 0).sum())

arguments = TrainingArguments(
    output_dir=saved + "-trained", max_steps=3, per_device_train_batch_size=2, learning_rate=1e-3, logging_steps=1,
    save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
)
rows = [{"input_ids": inputs[0], "labels": inputs[0]}] * 6
trainer = Trainer(model=again, args=arguments, train_dataset=rows)
trainer.train()
found["losses"] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
trainer.save_model(saved + "-trained")
trained = AutoModelForCausalLM.from_pretrained(saved + "-trained", trust_remote_code=True)
again.eval()

found |= {
    "trunk": torch.equal(trunk(inputs).last_hidden_state, model.model(inputs).last_hidden_state),
    "trained": torch.equal(trained(inputs).logits, again(inputs).logits),
    "tied": [other.lm_head.weight is other.model.embed_tokens.weight for other in (again, copied, trained)],
    "class": type(again).__name__,
    "prompt": prompt[0].tolist(),
    "chat_template": tokenizer.chat_template,
    "installed": [name for name in ("forgather", "datasets", "torchdata", "pytest") if find_spec(name)],
}
print(json.dumps(found))
"""

# As the documentation of models has it.
USING_THE_MODEL = """
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
)

model_path = "output_models/llama_4m"

# To HF, any code not defined in "transformers" is considered "remote code",
# so trust_remote_code=True is required for Forgather models.
tokenizer = AutoTokenizer.from_pretrained(model_path, trust_remote_code=True)
config = AutoConfig.from_pretrained(model_path, trust_remote_code=True)

# Construct a newly initialized model instance
model = AutoModelForCausalLM.from_config(config)

# Save initialized model weights with HF API
model.save_pretrained(model_path)

# Note: if the model has tied weights, disable safetensors serialization
model.save_pretrained(model_path, safe_serialization=False)

# Skip weight init and use bfloat16
from forgather.ml.no_init_weights import no_init_weights
from forgather.ml.utils import default_dtype

with no_init_weights(), default_dtype(torch.bfloat16):
    model = AutoModelForCausalLM.from_config(config)

# Move the model to first CUDA device
device = "cuda:0"
model.to(device=device)

# Load the model with weights using HF API (requires saved model weights)
model = AutoModelForCausalLM.from_pretrained(model_path, trust_remote_code=True)
"""
WITH_OUR_CHECKPOINTS = """
from forgather.ml.sharded_checkpoint import load_checkpoint, save_checkpoint

# Load weights from checkpoint
load_checkpoint(model_path, model, device=device)

# Save checkpoint
save_checkpoint(model_path, model)
"""
WHAT_CAME_OF_IT = """
import json
loaded = AutoModelForCausalLM.from_pretrained(model_path, trust_remote_code=True)
pairs = zip(loaded.named_parameters(), model.named_parameters(), strict=True)
found.append({
    "equal": all(name == other and torch.equal(one.cpu(), two.cpu()) for (name, one), (other, two) in pairs),
    "tied": loaded.lm_head.weight is loaded.model.embed_tokens.weight,
    "finite": all(bool(parameter.isfinite().all()) for parameter in model.parameters()),
    "dtype": str(loaded.dtype),
})
"""


def requirements(*names: str) -> set[str]:
    """The distributions that these need, themselves among them, as far as they are installed."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        try:
            required = distribution(name).requires or [] if name not in found else []
        except PackageNotFoundError:  # for another platform or an older Python
            continue
        found.add(name)
        waiting += [re.match(r"[\w.-]+", line)[0] for line in required if "extra ==" not in line]  # type: ignore[index]
    return found


@pytest.fixture(scope="module")
def bare_site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of installed packages with nothing but torch, transformers, accelerate and what these require."""
    site = tmp_path_factory.mktemp("site")
    for name in requirements("torch", "transformers", "accelerate"):
        for file in distribution(name).files or []:
            top = file.parts[0]
            if top not in ("..", "__pycache__") and not (site / top).exists():
                (site / top).symlink_to(Path(str(distribution(name).locate_file(top))))
    return site


def run_python(words: list[Any], folder: Path, **environment: str) -> Any:
    """The last line that a fresh Python prints, read as JSON; its warnings of users' concern are errors."""
    words = [sys.executable, "-W", "error::UserWarning", *map(str, words)]
    settings = {"HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(words, env=os.environ | settings, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def project_elsewhere(name: str, folder: Path) -> Path:
    """The model of a shipped project, saved away from its package, with what it computes."""
    model = construct(name, folder).eval()
    model.save_pretrained(folder / "saved")
    torch.save(model(torch.arange(3, 23).unsqueeze(0)).logits.detach(), folder / "saved" / "logits.pt")
    return folder / "saved"


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory, bare_site: Path) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("elsewhere")
    package(root / "built" / "tied_llama", tie_word_embeddings=True).write()
    shutil.move(root / "built" / "tied_llama", root / "moved")
    projects = [project_elsewhere(name, root / name.replace("/", "-")) for name in PROJECTS]
    # -S: without the packages of this installation.
    words = ["-S", "-c", ELSEWHERE, root / "moved", root / "saved", *projects]
    found = run_python(words, root, PYTHONPATH=str(bare_site))
    return {**found, "root": root}


@pytest.mark.case(14)
def test_a_package_loads_where_only_torch_and_transformers_are(elsewhere: dict[str, Any]) -> None:
    assert elsewhere["installed"] == []
    assert elsewhere["class"] == "TiedLlamaForCausalLM"
    assert elsewhere["chat_template"] == "{{ messages }}"
    assert elsewhere["trunk"]


@pytest.mark.case(14)
def test_the_model_of_every_project_loads_there(elsewhere: dict[str, Any]) -> None:
    assert elsewhere["projects"] == [True] * len(PROJECTS)


@pytest.mark.case(14, 45)
def test_greedy_generation_is_one_whatever_the_cache_and_the_padding(elsewhere: dict[str, Any]) -> None:
    none, dynamic, static = (elsewhere["generated"][cache] for cache in ("none", "dynamic", "static"))
    assert none == dynamic == static
    assert len(none) == len(elsewhere["prompt"]) + 12
    assert elsewhere["paddings"] > 0
    assert elsewhere["padded"] == [True, True, True]


@pytest.mark.case(36, 37)
def test_what_was_saved_comes_back(elsewhere: dict[str, Any]) -> None:
    assert elsewhere["equal"] == [True, True]
    assert elsewhere["tied"] == [True, True, True]
    with safe_open(elsewhere["root"] / "saved" / "model.safetensors", "pt") as weights:
        assert "model.embed_tokens.weight" in weights.keys()  # noqa: SIM118  it is not a mapping
        assert "lm_head.weight" not in weights.keys()  # noqa: SIM118


@pytest.mark.case(14)
def test_the_trainer_of_transformers_trains_it(elsewhere: dict[str, Any]) -> None:
    losses = elsewhere["losses"]
    assert len(losses) == 3
    assert losses[0] > losses[1] > losses[2] > 0
    assert elsewhere["trained"]


@pytest.mark.case(29, 30)
def test_from_config_draws_by_the_rules(elsewhere: dict[str, Any]) -> None:
    std = elsewhere["std"]
    assert std["model.embed_tokens.weight"] == pytest.approx(64**-0.5, rel=0.05)
    assert std["model.layers.2.self_attn.o_proj.weight"] == pytest.approx(0.02 / 6**0.5, rel=0.05)
    assert std["model.layers.2.mlp.up_proj.weight"] == pytest.approx(0.02, rel=0.05)
    assert std["model.norm.weight"] == 0
    assert "lm_head.weight" not in std


def test_a_package_that_save_pretrained_wrote_into_is_not_stale(elsewhere: dict[str, Any]) -> None:
    root = elsewhere["root"]
    shutil.copytree(root / "moved", root / "back" / "tied_llama")
    package(root / "back" / "tied_llama", tie_word_embeddings=True).write()


def test_the_python_of_the_documentation(tmp_path: Path) -> None:
    blocks = USING_THE_MODEL + WITH_OUR_CHECKPOINTS + WHAT_CAME_OF_IT
    if not torch.cuda.is_available():
        blocks = blocks.replace('"cuda:0"', '"cpu"')
    for name, tie in (("untied", False), ("tied", True)):
        package(tmp_path / name / "output_models" / "llama_4m", tie_word_embeddings=tie).write()
    both = f"import os\nfor name in ('untied', 'tied'):\n    os.chdir(name)\n    exec({blocks!r})\n    os.chdir('..')\n"
    found = run_python(["-c", f"found = []\n{both}print(json.dumps(found))"], tmp_path)
    expected = {"equal": True, "finite": True, "dtype": "torch.float32"}
    assert found == [{**expected, "tied": False}, {**expected, "tied": True}]


@pytest.mark.case(47)
def test_labels_are_shifted_averaged_and_divided_as_transformers_does(tiny: Package) -> None:
    model = tiny.construct("cpu").eval()
    tokens = torch.arange(3, 23).view(2, 10)
    labels = tokens.clone()
    labels[:, :4] = -100
    logits = model(tokens).logits[:, :-1]
    each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels[:, 1:], ignore_index=-100, reduction="none")
    assert (each != 0).sum() == 12
    torch.testing.assert_close(model(tokens, labels=labels).loss, each.sum() / 12)
    torch.testing.assert_close(model(tokens, labels=labels, num_items_in_batch=7).loss, each.sum() / 7)


@pytest.mark.case(48)
def test_logits_to_keep_and_hidden_states(tiny: Package) -> None:
    model = tiny.construct("cpu").eval()
    tokens = torch.arange(3, 23).view(2, 10)
    logits = model(tokens).logits
    last = model(tokens, logits_to_keep=1).logits
    assert last.shape == (2, 1, 277)
    torch.testing.assert_close(last, logits[:, -1:])
    torch.testing.assert_close(model(tokens, logits_to_keep=torch.tensor([0, 3])).logits, logits[:, [0, 3]])
    states = model(tokens, output_hidden_states=True).hidden_states
    assert [state.shape for state in states] == [(2, 10, 64)] * 4
    torch.testing.assert_close(model.lm_head(states[-1]), logits)


@pytest.mark.case(42)
def test_from_pretrained_computes_what_no_checkpoint_holds(tiny: Package, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    built = tiny.construct("cpu")
    built.save_pretrained(tmp_path)
    for options in ({}, {"dtype": torch.bfloat16}):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, **options)
        frequencies = loaded.model.rotary_emb.inv_freq
        assert frequencies.dtype == torch.float32
        assert torch.equal(frequencies, 1.0 / 10000.0 ** (torch.arange(0, 16, 2) / 16))
