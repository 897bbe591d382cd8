"""The lines before a run: epochs, bands and suggestions with the figures that are known for them."""

import pytest

from forgather.metrics.budget import Coverage, describe

# steps, tokens a step, train tokens; epochs to 4 places, band, steps for 2, 3.5 and 5 epochs rounded up.
KNOWN = [
    (1_000, 32 * 256, 1_234_567, 6.6355, "high", (302, 528, 754)),
    (500, 32 * 256, 1_000_000, 4.096, "good", (245, 428, 611)),
    (10_000, 32 * 256, 500_000_000, 0.1638, "very low", (122_071, 213_624, 305_176)),
    (100, 32 * 256, 1_000_000, 0.8192, "low", (245, 428, 611)),
]


@pytest.mark.parametrize(("steps", "tokens_per_step", "train_tokens", "epochs", "band", "suggested"), KNOWN)
def test_known_figures(steps, tokens_per_step, train_tokens, epochs, band, suggested):
    coverage = Coverage(steps, tokens_per_step, train_tokens)
    assert round(coverage.epochs, 4) == epochs
    assert coverage.band == band
    assert tuple(coverage.steps_for(e) for e in (2, 3.5, 5)) == suggested


@pytest.mark.parametrize(
    ("steps", "band"),
    [
        (49, "very low"),
        (50, "low"),
        (99, "low"),
        (100, "below"),
        (199, "below"),
        (200, "good"),
        (500, "good"),
        (501, "high"),
        (1000, "high"),
        (1001, "very high"),
    ],
)
def test_bands_at_their_edges(steps, band):
    assert Coverage(steps, tokens_per_step=10, train_tokens=1_000).band == band


def test_suggested_steps_really_reach_the_epochs_and_one_fewer_does_not():
    for train_tokens in (1_000, 1_234_567, 8_192, 8_191):
        coverage = Coverage(1, 8_192, train_tokens)
        for epochs in (2.0, 3.5, 5.0):
            steps = coverage.steps_for(epochs)
            assert Coverage(steps, 8_192, train_tokens).epochs >= epochs
            assert Coverage(steps - 1, 8_192, train_tokens).epochs < epochs


def test_the_text_says_everything_once():
    text = describe(
        mesh="replicate 1 x shard 2: 2 processes on cpu, 1 thread each",
        parameters=4_000_000,
        coverage=Coverage(1_000, 32 * 256, 1_234_567),
        output="runs/demo",
        notes=["batch: 32 rows, 2 microbatches of 8 on each rank"],
    )
    assert text.splitlines() == [
        "mesh        replicate 1 x shard 2: 2 processes on cpu, 1 thread each",
        "parameters  4,000,000",
        "tokens      8,192 a step x 1,000 steps = 8,192,000; 2.05 a parameter",
        "data        1,234,567 train tokens: 6.64 epochs, high (the model may begin to learn the data by heart); "
        "steps: 302 for 2, 528 for 3.5, 754 for 5",
        "batch       32 rows, 2 microbatches of 8 on each rank",
        "output      runs/demo",
    ]


def test_a_resumed_run_shows_what_is_behind_and_what_is_ahead():
    text = describe(mesh="m", parameters=1, coverage=Coverage(1_000, 1_000, 500_000), output="o", steps_done=500)
    assert "after step 500: 1.00 epochs seen, 1.00 to come" in text
    assert "2.00 epochs, good" in text
    assert "steps:" not in text  # nothing to suggest
