"""A model is divided between its blocks into fragments of like size, and each fragment has its turn."""

from itertools import pairwise
from math import prod

import pytest

from forgather.diloco.fragments import divide, due, require_schedule
from forgather.errors import ConfigError


def llama(num_layers: int, vocabulary: int = 64, width: int = 16) -> dict[str, tuple[int, ...]]:
    parameters: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, width)}
    for layer in range(num_layers):
        parameters |= {
            f"model.layers.{layer}.self_attn.q_proj.weight": (width, width),
            f"model.layers.{layer}.mlp.experts.0.weight": (width, width),  # the outer number is the block's
            f"model.layers.{layer}.mlp.experts.1.weight": (width, width),
            f"model.layers.{layer}.input_layernorm.weight": (width,),
        }
    return parameters | {"model.norm.weight": (width,), "lm_head.weight": (vocabulary, width)}


def layers_of(fragment: list[str]) -> list[int]:
    return sorted({int(name.split(".")[2]) for name in fragment if ".layers." in name})


def elements(parameters: dict[str, tuple[int, ...]], names: list[str]) -> int:
    return sum(prod(parameters[name]) for name in names)


@pytest.mark.training_case(72)
@pytest.mark.parametrize(
    ("step", "fragment"),
    [(200, 0), (400, 1), (600, 2), (800, 0), (1000, 1), (1200, 2), (0, None), (100, None), (201, None), (399, None)],
)
def test_the_schedule_of_three_fragments_in_600_steps(step, fragment):
    assert due(step, 600, 3) == fragment


@pytest.mark.training_case(72)
@pytest.mark.parametrize("sync_every", [1, 2, 3, 7, 10, 64, 100])
def test_every_fragment_has_one_turn_in_as_many_steps_as_were_asked_for(sync_every):
    for num_fragments in range(1, sync_every + 1):
        for cycle in range(3):
            steps = range(cycle * sync_every + 1, (cycle + 1) * sync_every + 1)
            turns = [fragment for step in steps if (fragment := due(step, sync_every, num_fragments)) is not None]
            assert turns == list(range(num_fragments)), (sync_every, num_fragments, cycle)


def test_turns_are_as_far_apart_as_can_be():
    turns = [step for step in range(1, 201) if due(step, 100, 7) is not None]
    assert {after - before for before, after in pairwise(turns)} == {14, 15}


@pytest.mark.training_case(73)
def test_more_fragments_than_steps_are_refused():
    require_schedule(4, 4)
    with pytest.raises(ConfigError, match="4 fragments cannot take turns in 2 steps") as caught:
        require_schedule(2, 4)
    assert caught.value.fix is not None
    assert "sync_every: 4" in caught.value.fix
    with pytest.raises(ConfigError, match="sync_every is 0"):
        require_schedule(0, 1)
    with pytest.raises(ConfigError, match="0 fragments"):
        require_schedule(10, 0)


@pytest.mark.training_case(72)
@pytest.mark.parametrize("assignment", ["strided", "sequential"])
@pytest.mark.parametrize("num_fragments", [1, 2, 3, 4, 10])
def test_equal_blocks_are_spread_evenly_and_nothing_is_left_out(assignment, num_fragments):
    parameters = {f"{block}.{kind}": (8, 8) for block in range(10) for kind in ("weight", "bias")}
    fragments = divide(parameters, num_fragments, assignment)
    counts = [len(fragment) // 2 for fragment in fragments]
    assert sum(counts) == 10
    assert max(counts) - min(counts) <= 1
    assert sorted(name for fragment in fragments for name in fragment) == sorted(parameters)
    for fragment in fragments:
        assert fragment == [name for name in parameters if name in fragment], "in the model's order"
        for block in {name.split(".")[0] for name in fragment}:
            assert {f"{block}.weight", f"{block}.bias"} <= set(fragment), "cut between blocks"
    blocks = [[int(name.split(".")[0]) for name in fragment[::2]] for fragment in fragments]
    if assignment == "strided":
        assert blocks == [list(range(first, 10, num_fragments)) for first in range(num_fragments)]
    else:
        assert [block for fragment in blocks for block in fragment] == list(range(10))


@pytest.mark.training_case(72)
@pytest.mark.parametrize("num_fragments", [0, -1, 5])
@pytest.mark.parametrize("assignment", ["strided", "sequential"])
def test_more_fragments_than_blocks_and_none_are_refused(num_fragments, assignment):
    with pytest.raises(ConfigError, match=f"{num_fragments} fragments of a model with 4 blocks") as caught:
        divide(llama(4), num_fragments, assignment)
    assert caught.value.fix == "a number of fragments from 1 to 4"


@pytest.mark.parametrize("assignment", ["strided", "sequential"])
@pytest.mark.parametrize("vocabulary", [16, 200, 1000])
def test_large_embeddings_do_not_make_a_fragment_large(assignment, vocabulary):
    parameters = llama(12, vocabulary)
    block = elements(parameters, [name for name in parameters if ".layers.3." in name])
    whole = elements(parameters, list(parameters))
    embedding = vocabulary * 16
    for num_fragments in (2, 3, 4):
        fragments = divide(parameters, num_fragments, assignment)
        sizes = [elements(parameters, fragment) for fragment in fragments]
        assert sum(sizes) == whole
        # No better than this can be promised: a unit cannot be cut, and neighbours cannot be chosen freely.
        fair = max(whole / num_fragments, embedding)
        slack = block if assignment == "strided" else block + min(embedding, fair)
        assert max(sizes) <= fair + slack
        assert min(sizes) > 0


def test_strided_fragments_reach_from_the_first_blocks_to_the_last():
    fragments = divide(llama(12), 3)
    assert all(layers_of(fragment)[0] <= 4 for fragment in fragments)
    assert all(layers_of(fragment)[-1] >= 9 for fragment in fragments)
    sequential = [layers_of(fragment) for fragment in divide(llama(12), 3, "sequential")]
    assert [layer for layers in sequential for layer in layers] == list(range(12))


def test_the_least_sum_of_squares_by_hand():
    sizes = {"0.w": (5,), "1.w": (1,), "2.w": (1,), "3.w": (4,), "4.w": (3,)}
    assert divide(sizes, 3, "sequential") == [["0.w"], ["1.w", "2.w", "3.w"], ["4.w"]]  # 25 + 36 + 9; 7, 4, 3 is 74
    assert divide(sizes, 2, "sequential") == [["0.w", "1.w", "2.w"], ["3.w", "4.w"]]


def test_what_stands_between_lists_of_blocks_belongs_to_the_block_before():
    names = [
        "shared",
        "encoder.block.0.w",
        "encoder.block.1.w",
        "encoder.norm",
        "decoder.block.0.w",
        "decoder.block.1.w",
    ]
    assert divide(dict.fromkeys(names, (4,)), 3, "sequential") == [
        ["shared", "encoder.block.0.w"],
        ["encoder.block.1.w", "encoder.norm"],
        ["decoder.block.0.w", "decoder.block.1.w"],
    ]


def test_a_list_of_one_is_no_list_of_blocks_and_numbers_count_as_numbers():
    names = sorted(f"stages.0.layers.{layer}.w" for layer in range(12))  # 1, 10, 11, 2: as text
    fragments = divide(dict.fromkeys(names, (4,)), 12, "sequential")
    assert fragments == [[f"stages.0.layers.{layer}.w"] for layer in range(12)]


def test_a_model_without_numbers_is_divided_between_its_modules():
    parameters = {"a.weight": (4,), "a.bias": (4,), "b.weight": (4,), "c.weight": (4,)}
    assert divide(parameters, 3) == [["a.weight", "a.bias"], ["b.weight"], ["c.weight"]]
    assert divide({"scale": ()}, 1) == [["scale"]]


def test_an_unknown_assignment_is_refused():
    with pytest.raises(ConfigError, match="'random'"):
        divide(llama(2), 2, "random")  # type: ignore[arg-type]
