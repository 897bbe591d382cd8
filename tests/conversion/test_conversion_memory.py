"""Conversion takes the memory of a shard and of the largest tensor, whatever the size of the model."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conversion.stock_models import save_stock

SHARD = 12_000_000
_MEASURE = """
import re, sys
from pathlib import Path
from forgather.conversion.export import export
from forgather.conversion.importing import import_model
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
root, shard = Path(sys.argv[1]), int(sys.argv[2])
def there_and_back(name):
    import_model(root / name, root / f"{name}-package", max_shard_bytes=shard)
    export(root / f"{name}-package", root / f"{name}-native", native=True, max_shard_bytes=shard)
there_and_back("small")
Path("/proc/self/clear_refs").write_text("5")
before = peak()
there_and_back("large")
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads peak memory from Linux's /proc")
@pytest.mark.soak  # processes of their own, with weights worth measuring
def test_memory_is_a_shard_not_the_model(tmp_path: Path) -> None:
    """Peak over idle, there and back with all comparisons; the model has sixteen shards, of several tensors each."""
    save_stock(tmp_path / "small", "llama")
    sizes = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 12, "num_attention_heads": 8}
    model = save_stock(tmp_path / "large", "llama", max_shard_bytes=SHARD, **sizes)
    total = sum(parameter.nbytes for parameter in model.parameters())
    largest = max(parameter.nbytes for parameter in model.parameters())
    del model
    process = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(tmp_path), str(SHARD)], capture_output=True, text=True, check=True
    )
    grown = int(process.stdout)
    assert total > 10 * SHARD
    assert len(list((tmp_path / "large-native").glob("*.safetensors"))) > 10
    assert grown <= 1.1 * SHARD + 3 * largest, f"{grown / 1e6:.1f} MB; the model {total / 1e6:.1f}"
