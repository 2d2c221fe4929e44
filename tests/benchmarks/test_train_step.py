"""The benchmark of an iteration: its rival computes the same, work is counted correctly, and it runs and reports."""

import json

import pytest
import torch
from pecker_fast.benchmarks.step_flops import count_flops, iteration_flops, matmul_rate, named_peak
from pecker_fast.benchmarks.step_problem import ARCHITECTURES, METHODS, PRECISIONS, Problem, precision
from pecker_fast.benchmarks.step_rival import Rival
from pecker_fast.benchmarks.train_step import Variant, run

from pecker_fast.benchmarks import step_report, train_step
from pecker_fast.diffusion import predict

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["sfd", "pecker", "pecker-every-1"])
def test_rival_losses_and_weights_agree(name):
    problem = Problem.make("tiny", 3, CPU, dropout=0.0)
    # Large steps, so that the weights matter.
    rates = {"score_learning_rate": 1e-3, "generator_learning_rate": 1e-3, "ema_decay": 0.5}
    ours, rival = problem.ours(name, "fp32", **rates), Rival(problem, name, **rates)
    masks = []
    for number in range(3):
        losses, expected = ours(), rival()
        assert losses.keys() == expected.keys()
        for key, loss in losses.items():
            # The losses of the generator are sums of terms of either sign.
            scale = max(abs(value) for value in map(float, expected.values()))
            # An entry at the mask's threshold may be in one mask and not in the other, and Adam's steps are signs.
            assert loss.item() == pytest.approx(expected[key].item(), abs=2e-4 * (number + 1) * scale), (key, number)
        if rival.masked:
            own = ours.phase.masker.mask
            differ = sum(int((own[i] != salient.bool()).sum()) for i, salient in enumerate(rival.mask))
            assert differ <= 0.002 * own.numel
            masks.append([salient.clone() for salient in rival.mask])
    start = torch.cat([p.flatten() for p in problem.teacher.parameters()])
    with ours.phase.averaged() as network:
        averaged = torch.cat([p.detach().flatten() for p in network.parameters()])
    other = torch.cat([rival.average[key].flatten() for key, _ in problem.teacher.named_parameters()])
    assert (averaged - other).norm() <= 0.05 * (averaged - start).norm() and (averaged - start).norm() > 0
    if rival.masked:
        same = all(torch.equal(a, b) for a, b in zip(masks[0], masks[1], strict=True))
        assert same == (METHODS[name][1] != 1)


def test_rival_does_the_same_work():
    """Network evaluations are counted in forward passes of n samples: 2 to sample, 6 for the score step, 2 for the
    generator's forward pass, 4 + 4 for teacher and score network, 4 back: 22; a mask is 3 of its own samples."""
    problem = Problem.make("tiny", 2, CPU)
    x, t, labels = torch.randn(2, 3, 8, 8), torch.tensor([3, 500]), torch.tensor([0, 1])
    with torch.no_grad():
        forward = count_flops(lambda: predict(problem.teacher, problem.schedule, x, t, labels))
    for name, expected in (("sfd", 22.0), ("pecker-every-1", 25.0)):
        ours = iteration_flops("tiny", name, 1, CPU)
        # A little less, since the input needs no gradient; a little more, since attention has five products in its
        # backward pass for two in its forward pass.
        assert 0.95 * expected <= 2 * ours / forward <= 1.03 * expected, name
    assert iteration_flops("tiny", name, 1, CPU, rival=True) == pytest.approx(ours, rel=1e-3)


@pytest.mark.parametrize("name", ["sfd", "pecker-once"])
def test_fixed_number_of_forgotten_samples_is_counted_once(name):
    iteration = Problem.make("digits", 5, CPU).ours(name, "fp32")
    iteration()
    counted = count_flops(iteration)
    assert iteration_flops("digits", name, 5, CPU) == pytest.approx(counted, rel=1e-6)


def test_flops_are_counted_by_their_definition():
    a, b = torch.randn(5, 7), torch.randn(7, 3)
    assert count_flops(lambda: a @ b) == 2 * 5 * 7 * 3
    x, weight = torch.randn(2, 3, 8, 8, requires_grad=True), torch.randn(4, 3, 3, 3)
    conv = lambda: torch.nn.functional.conv2d(x, weight, padding=1)  # noqa: E731
    assert count_flops(conv) == 2 * 2 * 64 * 4 * 27
    # Backward to the image only: the weight requires no gradient.
    assert count_flops(lambda: conv().sum().backward()) == 2 * 2 * 2 * 64 * 4 * 27
    q = torch.randn(2, 1, 16, 8)
    assert count_flops(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q)) == 2 * 2 * 2 * 16 * 16 * 8


def test_peaks_by_name():
    assert named_peak("NVIDIA H200", "bf16") == 989e12 and named_peak("NVIDIA A100-SXM4-80GB", "default") == 156e12
    assert named_peak("NVIDIA H100 PCIe", "fp32") == 51e12 and named_peak("NVIDIA H100 80GB HBM3", "fp32") == 67e12
    assert named_peak("AMD EPYC", "fp32") is None
    assert matmul_rate(CPU, "fp32", max_seconds=0.1) > 1e8


def test_precisions_are_set_and_restored():
    flags = lambda: (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)  # noqa: E731
    before = flags()
    for name, (_, matmul, conv) in PRECISIONS.items():
        with precision(name):
            assert flags() == (matmul, conv)
    assert flags() == before


def test_published_sizes():
    # The public networks, plus the 534,144 parameters (1.4 %) that their embeddings have more in diffusers.
    assert Problem.make("cifar10", None, CPU).numel == 38_632_323 + 534_144
    assert ARCHITECTURES["cifar10"].batch == 128 and ARCHITECTURES["stl10"].batch == 64


def test_rows_figures_table_and_plot(tmp_path):
    variants = [Variant("tf32", split_batches=True)]
    results = run(["tiny"], ["sfd", "pecker"], variants, batch=1, block=1, repeats=2, max_seconds=0.1)
    assert [(row["method"], row["variant"]) for row in results["rows"]] == [
        ("sfd", "tf32 split"),
        ("pecker", "tf32 split"),
    ]
    for row in results["rows"]:
        assert row["ms"]["p20"] <= row["ms"]["p50"] <= row["ms"]["p80"]
        assert row["images_per_second"] == pytest.approx(1e3 / row["ms"]["p50"])
        assert row["speedup"] == pytest.approx(row["rival"]["ms"]["p50"] / row["ms"]["p50"])
        rate = row["flops"] / row["ms"]["p50"] * 1e3
        assert row["of_matmul_rate"] == pytest.approx(rate / results["matmul_flops_per_second"][row["precision"]])
        assert ("over_sfd" in row) == (row["method"] == "pecker")
        shares = row["phases_seconds"]
        assert {"sampling", "score step", "optimizer", "generator backward"} <= shares.keys()
        assert row["optimizer_share"] == pytest.approx(
            (shares["optimizer"] + shares.get("selection", 0.0)) / sum(shares.values())
        )
        # Bars are for the published networks on a GPU.
        assert all(figure["met"] is None for figure in row["figures"])
    path = tmp_path / "out.json"
    train_step.save(results, path)
    text = step_report.markdown(json.loads(path.read_text()))
    assert "tf32 split" in text and "missed" not in text and results["conditions"]["packages"]["torch"] in text
    assert step_report.main([str(path), "--plot", str(tmp_path / "plot.png")]) == 0
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_bars_are_judged_on_a_gpu():
    row = {"device": "cuda", "arch": "cifar10", "batch": 128, "precision": "bf16", "method": "pecker"}
    row |= {"speedup": 3.5, "peak_bytes": 70, "rival_peak_bytes": 100, "optimizer_share": 0.02, "over_sfd": 1.06}
    met = {figure["figure"]: figure["met"] for figure in train_step.figures(row)}
    assert met == {
        "rival / ours": True,
        "memory / rival": False,
        "optimizer, selection, average": True,
        "pecker / sfd": False,
    }
    equal = train_step.figures({**row, "precision": "tf32", "speedup": 1.4})
    assert equal[0]["bar"] == 1.5 and equal[0]["met"] is False


def test_out_of_memory_is_a_skipped_row(monkeypatch):
    def measure(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB\nmore")

    monkeypatch.setattr(train_step, "measure", measure)
    (row,) = run(["tiny"], ["sfd"], [Variant("fp32")], batch=1)["rows"]
    assert row["skipped"].startswith("CUDA out of memory") and "skipped" in step_report.text_table([row])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arch", "imagenet"], "arch is 'imagenet', expected one of tiny, digits, cifar10, stl10"),
        (["--methods", "salun"], "methods is 'salun'"),
        (["--precision", "fp8"], "precision is 'fp8'"),
        (["--device", "tpu"], "device is 'tpu'"),
        (["--cuda-graphs", "on", "--device", "cpu"], "cuda_graphs is on, which needs a GPU"),
        (["--block", "0"], "block is 0, expected at least 1"),
        (["--json", "/nowhere/out.json"], "there is no folder '/nowhere'"),
    ],
)
def test_wrong_arguments_are_named(arguments, message, capsys):
    assert train_step.main(["--arch", "tiny", "--device", "cpu", *arguments]) == 2
    assert message in capsys.readouterr().err
