"""Models with enough blocks for four stages, trained for some steps on any mesh, with a pipeline or without."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from forgather.distributed import fsdp
from forgather.distributed.environment import Environment
from forgather.distributed.mesh import Mesh
from forgather.distributed.pipeline_plan import PipelinePlan
from forgather.generation.sample import generate_ids
from forgather.generation.sampling import Sampler
from forgather.models.parts.initializers import Normal, Ones, Zeros
from forgather.optim.schedules import constant
from forgather.trainers.assemble import assemble
from forgather.trainers.evaluation import Evaluation
from forgather.trainers.strategy import build_loss, build_step
from forgather.trainers.update import Update
from tests.trainers.tiny import LENGTH, VOCABULARY, microbatches, rows_of_step

ROWS = 8
Run = list[tuple[float, float]]  # of each step: loss, gradient norm


class Source:
    """A stock model of four blocks, as `assemble` wants its models."""

    def __init__(self, kind: str = "llama", tied: bool = False, blocks: int = 4, dropout: float = 0.0) -> None:
        self.kind, self.tied, self.blocks, self.dropout = kind, tied, blocks, dropout
        self.init_rules = {"norm|ln_.*weight": Ones(), "bias": Zeros(), ".*": Normal(std=0.2)}
        if kind == "llama":
            del self.init_rules["bias"]

    def construct(
        self, device: str = "meta", *, dtype: torch.dtype | None = None, attn_implementation: str | None = None
    ) -> PreTrainedModel:
        with torch.device(device):
            return self._gpt2() if self.kind == "gpt2" else self._llama()

    def _llama(self) -> PreTrainedModel:
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCABULARY,
                hidden_size=24,
                intermediate_size=40,
                num_hidden_layers=self.blocks,
                num_attention_heads=2,
                num_key_value_heads=2,
                max_position_embeddings=LENGTH,
                tie_word_embeddings=self.tied,
                attention_dropout=self.dropout,
                bos_token_id=None,
                eos_token_id=None,
            )
        )

    def _gpt2(self) -> PreTrainedModel:
        rates = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), self.dropout)
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=VOCABULARY,
                n_embd=24,
                n_layer=self.blocks,
                n_head=2,
                n_positions=LENGTH,
                tie_word_embeddings=self.tied,
                bos_token_id=None,
                eos_token_id=None,
                **rates,
            )
        )


class Staged:
    """A model under training: `step(number)`, `evaluate()`, `sample()`, `weights()`."""

    def __init__(
        self,
        axes: dict[str, int] | None = None,
        source: dict[str, Any] | None = None,
        accumulate: int = 4,
        groups: bool = False,
        max_grad_norm: float | None = 1.0,
        lr: float = 1e-2,
        plan: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self.mesh = Mesh(Environment(device="cpu"), **(axes or {}))
        self.rows = ROWS // self.mesh.data_ranks
        self.plan = PipelinePlan(
            self.mesh, rows=self.rows, rows_per_forward=self.rows // accumulate, length=LENGTH, **(plan or {})
        )
        limit, fsdp.ONE_GROUP_BELOW = fsdp.ONE_GROUP_BELOW, (0 if groups else 10**9)
        try:
            self.model = assemble(Source(**(source or {})), self.mesh, pipeline=self.plan, **options)
        finally:
            fsdp.ONE_GROUP_BELOW = limit
        self.loss = build_loss(self.model, chunk_rows=8)
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=lr, weight_decay=0.1, fused=True)
        update = Update(optimizer, constant(), self.mesh, max_grad_norm=max_grad_norm)
        self.step = build_step(self.model, self.loss, update, self.mesh)

    def batches(self, number: int) -> list[Any]:
        count = self.rows // self.plan.rows_per_microbatch
        return microbatches(number, self.mesh.data_rank, self.mesh.data_ranks, count)

    def train(self, steps: int) -> Run:
        run = []
        for number in range(steps):
            result = self.step(number, self.batches(number))
            loss = result.loss_sum.double()
            if self.mesh.environment.world_size > 1:
                torch.distributed.all_reduce(loss)
            run.append((loss.item(), result.grad_norm.item()))
        return run

    def evaluate(self) -> dict[str, float]:
        rows = rows_of_step(1000, rows=6)
        mine = rows[self.mesh.data_rank :: self.mesh.data_ranks]
        return Evaluation(self.loss, mine, self.mesh)()

    def sample(self, tokens: int = 6) -> list[int]:
        return generate_ids(self.model, [3, 1, 4, 1, 5], Sampler(temperature=0), max_new_tokens=tokens)

    def weights(self) -> dict[str, Tensor]:
        """This rank's parameters by name, each gathered over the ranks of its stage."""
        return {
            name: (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach().clone()
            for name, parameter in self.model.named_parameters()
        }


def train(steps: int, **options: Any) -> Run:
    return Staged(**options).train(steps)


def train_and_look(steps: int, **options: Any) -> dict[str, Any]:
    """All there is to compare: the run, an evaluation before and after it, a sample, the weights."""
    staged = Staged(**options)
    before = staged.evaluate()
    run = staged.train(steps)
    modes = {module.training for module in staged.model.modules()}
    return {
        "before": before,
        "run": run,
        "after": staged.evaluate(),
        "sample": staged.sample(),
        "rehearsal": staged.step.rehearse(staged.batches(steps)),
        "weights": staged.weights(),
        "modes": modes,
        "described": staged.step.describe(),
    }
