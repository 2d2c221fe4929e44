"""The benchmark of memory at full size, on a tiny network."""

import json
import subprocess
import sys

import pytest
import torch
from pecker_fast.benchmarks.full_size_memory import PARTS, parser, random_network, result_of, shallower, table

from pecker_fast.benchmarks import full_size_memory
from pecker_fast.training.memory import SD15, SDXL

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


@pytest.mark.slow
def test_measures_every_part_beside_its_estimate(tmp_path):
    words = ["--model", "tiny", "--latents", "8", "--saliency_parts", "2", "--folder", str(tmp_path)]
    args = parser().parse_args(words)
    result = result_of(args)
    assert list(result["measured_bytes"]) == list(PARTS) and list(result["estimated_bytes"]) == list(PARTS[1:])
    assert result["peak_bytes"] == max(result["measured_bytes"].values()) >= result["process_bytes"]
    assert all(0 < size < result["peak_bytes"] for size in (result["weights_bytes"], result["state_bytes"]))
    # One copy of the weights.
    assert result["weights_bytes"] == 2 * result["parameters"]
    full_size_memory.file_of(args).write_text(json.dumps(result))
    assert "**most at a time**" in table(tmp_path) and "| generator's step | " in table(tmp_path)


def test_a_share_of_the_layers():
    half = shallower(SDXL, 0.5)
    assert half["transformer_layers_per_block"] == (1, 1, 5) and half["layers_per_block"] == 1
    assert half["block_out_channels"] == SDXL["block_out_channels"] and shallower(SD15, 1.0) == SD15


def test_random_networks_are_made_in_their_dtype():
    network = random_network(full_size_memory.TINY, 8, torch.bfloat16)
    assert {param.dtype for param in network.parameters()} == {torch.bfloat16}
    eps = network(torch.randn(2, 4, 8, 8), torch.tensor([3, 900]), torch.tensor([0, 1]))[0].float()
    assert eps.isfinite().all() and 1e-3 < eps.std() < 1e3


def test_ends_itself_if_the_machine_has_too_little_memory():
    code = (
        "import time; from pecker_fast.benchmarks.full_size_memory import watched\n"
        "with watched(1e6):\n    time.sleep(60)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=55)
    assert done.returncode == 1 and "less than --least_available: stopped" in done.stdout
