"""A plan says what was found and what comes of it, for people and as data, and its choice can be typed."""

import json

import pytest

from forgather.diloco.forecast import Link, Machine, Setting, forecast_diloco
from forgather.diloco.plan import Plan, flags

GBIT = Link(125e6, 125e6, 0.002)
MACHINES = [Machine(0.5, GBIT), Machine(0.5, GBIT)]


def test_every_row_is_a_forecast_and_the_choice_is_last():
    plan = Plan.make(MACHINES, GBIT, 150 * 10**6, num_blocks=12)
    lines = plan.text().splitlines()
    assert lines[0] == "150,000,000 parameters, 2 workers"
    assert lines[1] == "worker 0: 500.0 ms a step, 1,000 Mbit/s up, 1,000 Mbit/s down, 2.00 ms there and back"
    table = [line.split() for line in lines if line.startswith(("DDP", "FSDP", "DiLoCo"))]
    assert [row[0] for row in table] == ["DDP", "FSDP", *["DiLoCo"] * 19]
    # 4.8 s, hidden in no more than a third of a second: 0.5 / (0.167 + 4.802); 7.2 s
    assert table[0][1:5] == ["1", "fp32", "32", "10.1%"]
    assert table[1][1:5] == ["1", "fp32", "32", "6.9%"]
    # H 30, bf16: 2 workers x 2 legs x 2.4 s in 15 s
    assert table[2][1:] == ["30", "1", "0", "bf16", "16", "61.0%", "20.00", "9.61", "s"]
    streamed = forecast_diloco(MACHINES, GBIT, 150 * 10**6, Setting(30, 4, "bf16", "bf16", 6))
    assert table[3][1:7] == ["30", "4", "6", "bf16", "16", f"{streamed.utilisation:.1%}"]
    setting = plan.choice.setting
    assert setting is not None
    assert table[-1][1:4] == [str(setting.sync_every), str(setting.num_fragments), str(setting.delay)]
    assert f"  {flags(setting)}" in lines


def test_as_data_it_is_json_without_infinities():
    plan = Plan.make([Machine(0.5)], Link(), 10**6)
    data = json.loads(json.dumps(plan.to_json(), allow_nan=False))
    assert data["server"] == {"up_bytes_per_s": None, "down_bytes_per_s": None, "latency_s": 0.0}
    assert data["choice"]["setting"]["sync_every"] == 30
    assert data["choice"]["utilisation"] == 1.0
    assert data["forecasts"][0]["method"] == "DDP"
    assert "no limit up" in plan.text()


def test_models_of_few_blocks_are_not_streamed():
    assert len(Plan.make(MACHINES, GBIT, 10**6, num_blocks=3).forecasts) == 2 + 9
    assert len(Plan.make(MACHINES, GBIT, 10**6, num_blocks=4).forecasts) == 2 + 18


def test_flags_name_what_differs_from_the_plainest():
    assert flags(Setting(100)) == "--sync-every 100 --upload bf16 --download bf16"
    assert (
        flags(Setting(30, 4, "int8", "int4", 3))
        == "--sync-every 30 --upload int8 --download int4 --fragments 4 --delay 3"
    )


@pytest.mark.parametrize(
    ("machines", "parameters", "said"),
    [
        (MACHINES, 10**11, "no setting reaches it"),
        ([Machine(0.1), Machine(1.0)], 10**6, "wait for the slowest (55% at best)"),
        (MACHINES, 10**6, "plain data parallel reaches it"),
    ],
)
def test_advice(machines, parameters, said):
    others = {"no setting", "wait for", "plain data"} - {said[:10], said[:8]}
    text = Plan.make(machines, GBIT, parameters).text()
    assert said in text
    assert parameters != 10**11 or not any(other in text for other in others)
