"""Random calls of masked_adam_, their expected results, and the allowed errors."""

from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from pecker_fast import ops
from tests import oracle
from tests.inputs import random_masks, same_bits, with_garbage_tails, word_offsets, words_of
from tests.oracle import AdamOptions, AdamState

KINDS = ("plain", "masked", "joint", "joint_everywhere")
STATE_LISTS = ("exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "masters", "emas", "counts")


@dataclass
class AdamCase:
    """One call: ``kind`` of step, tensors on the CPU (packed state in its dense form) and options."""

    kind: str
    dtype: torch.dtype
    options: AdamOptions
    params: list[Tensor]
    grads: list[Tensor | None]
    masked_grads: list[Tensor | None]
    masks: list[np.ndarray] | None
    steps: list[float]
    exp_avgs: list[Tensor] = field(default_factory=list)
    exp_avg_sqs: list[Tensor] = field(default_factory=list)
    max_exp_avg_sqs: list[Tensor] = field(default_factory=list)
    masters: list[Tensor] = field(default_factory=list)
    emas: list[Tensor] = field(default_factory=list)
    counts: list[Tensor] = field(default_factory=list)
    packed: bool = False
    packed_grads: bool = False
    packed_values: bool = False  # masters and EMA too
    ema_everywhere: bool = False
    found_inf: float | None = None
    stochastic_rounding: bool = False
    seed: int = 0
    tensor_numbers: tuple[int, ...] = ()

    @property
    def numels(self) -> list[int]:
        return [p.numel() for p in self.params]

    @property
    def compute(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def describe(self) -> str:
        return (
            f"{self.kind} {self.dtype} numels={self.numels} packed={self.packed} packed_grads={self.packed_grads} "
            f"packed_values={self.packed_values} masters={bool(self.masters)} "
            f"counts={[c.dtype for c in self.counts[:1]]} amsgrad={bool(self.max_exp_avg_sqs)} "
            f"ema_everywhere={self.ema_everywhere} steps={self.steps} {self.options}"
        )

    def run(self, backend: str | None, device: str = "cpu") -> dict[str, list[Tensor]]:
        """Calls the operator on copies; the lists that it may write to, packed state unpacked again."""
        o = self.options
        move = lambda tensors: [None if t is None else t.clone().to(device) for t in tensors]  # noqa: E731
        lists = {name: move(getattr(self, name)) for name in ("params", *STATE_LISTS)}
        grads = move(self.grads)
        offsets = None
        packed_lists = ["exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "counts"] if self.packed else []
        if self.packed:
            packed_lists += ["masters", "emas"] if self.packed_values else []
            chosen = [torch.from_numpy(mask) for mask in self.masks]
            if self.packed_grads:
                pairs = zip(grads, chosen, strict=True)
                grads = [None if g is None else g.view(-1)[bits.to(device)] for g, bits in pairs]
            for name in packed_lists:
                lists[name] = [t.view(-1)[bits.to(device)] for t, bits in zip(lists[name], chosen, strict=False)]
            before = [np.concatenate([[0], np.cumsum(mask)])[:-1:16384] for mask in self.masks]
            offsets = torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *before])).to(device)
        words = None if self.masks is None else with_garbage_tails(words_of(self.masks), self.numels).to(device)
        scalar = lambda v, dtype=torch.float32: None if v is None else torch.tensor(v, dtype=dtype, device=device)  # noqa: E731
        ops.masked_adam_(
            lists["params"],
            grads,
            move(self.masked_grads),
            *(lists[name] for name in STATE_LISTS),
            torch.tensor(self.steps, dtype=torch.float32, device=device),
            scalar(o.lr, torch.float64),
            ops.bias_table(o.beta1, o.beta2, self.compute, device) if self.counts else None,
            words,
            [] if words is None else word_offsets(self.numels),
            offsets,
            scalar(o.grad_scale),
            scalar(self.found_inf),
            beta1=o.beta1,
            beta2=o.beta2,
            eps=o.eps,
            weight_decay=o.weight_decay,
            decoupled_weight_decay=o.decoupled_weight_decay,
            maximize=o.maximize,
            clip_value=o.clip_value,
            max_update=o.max_update,
            retain_variance=o.retain_variance,
            zero_nonfinite=o.zero_nonfinite,
            ema_decay=o.ema_decay,
            ema_everywhere=self.ema_everywhere,
            stochastic_rounding=self.stochastic_rounding,
            seed=self.seed,
            tensor_numbers=self.tensor_numbers,
            backend=backend,
        )
        if self.packed:
            for name in packed_lists:
                for i, bits in enumerate(chosen[: len(lists[name])]):
                    dense = getattr(self, name)[i].clone().view(-1)
                    dense[bits] = lists[name][i].cpu()
                    lists[name][i] = dense.view(getattr(self, name)[i].shape)
        return {name: [t.cpu() for t in tensors] for name, tensors in lists.items()}

    # ---- what it should give

    def before(self, i: int) -> AdamState:
        array = lambda name: oracle.to_numpy(getattr(self, name)[i]).reshape(-1) if getattr(self, name) else None  # noqa: E731
        x = array("masters") if self.masters else array("params")
        step = array("counts") if self.counts else np.full(x.size, self.steps[i] - 1)
        return AdamState(x, array("exp_avg_sqs"), step.astype(np.int64), array("exp_avgs"), array("max_exp_avg_sqs"))

    def gradients(self, i: int) -> tuple[np.ndarray | None, np.ndarray | None]:
        pair = (self.grads[i], self.masked_grads[i] if self.masked_grads else None)
        return tuple(None if g is None else oracle.to_numpy(g).reshape(-1) for g in pair)

    def after(self, i: int, dtype: type) -> AdamState:
        mask = None if self.masks is None else self.masks[i]
        return oracle.adam_step(
            self.before(i), *self.gradients(i), mask, self.kind.startswith("joint"), self.options, dtype
        )

    def check(self, result: dict[str, list[Tensor]]) -> None:
        """Frozen entries bit for bit, counts exactly, all else with at most twice the error of plain code."""
        errors: dict[str, list[tuple[float, float]]] = {}
        double = self.dtype == torch.float64
        truth_type, plain_type = (np.longdouble, np.float64) if double else (np.float64, np.float32)
        for i, numel in enumerate(self.numels):
            grad, masked_grad = self.gradients(i)
            if self.found_inf or (grad is None and masked_grad is None):
                self.check_untouched(result, i)
                continue
            truth, plain = self.after(i, truth_type), self.after(i, plain_type)
            scales = oracle.adam_scales(self.before(i), grad, masked_grad, self.options, truth)
            pairs = {
                "exp_avgs": (truth.exp_avg, plain.exp_avg, scales.exp_avg),
                "exp_avg_sqs": (truth.exp_avg_sq, plain.exp_avg_sq, scales.exp_avg_sq),
                "max_exp_avg_sqs": (truth.max_exp_avg_sq, plain.max_exp_avg_sq, scales.max_exp_avg_sq),
                "masters" if self.masters else "params": (truth.x, plain.x, scales.x),
            }
            for name, (exact, rough, scale) in pairs.items():
                if exact is None:
                    continue
                stored, old = result[name][i], getattr(self, name)[i]
                self.check_frozen(name, stored, old, truth.updated)
                rough = oracle.to_numpy(torch.from_numpy(rough).to(stored.dtype))
                self.compare(name, stored, exact, rough, scale, truth.updated, errors)
            if self.masters:
                rounded = result["masters"][i].to(self.dtype)
                frozen = torch.from_numpy(~truth.updated).view(rounded.shape)
                expected = torch.where(frozen, self.params[i], rounded)
                assert same_bits(result["params"][i], expected), f"params[{i}] is not the rounded master"
            if self.counts:
                top = torch.iinfo(self.counts[i].dtype).max
                expected = np.minimum(truth.step, top)
                assert (result["counts"][i].view(-1).numpy() == expected).all(), f"counts[{i}]"
            if self.emas:
                self.check_ema(result, i, truth.updated, truth_type, plain_type, errors)
            assert numel == result["params"][i].numel()
        for name, columns in errors.items():
            ours, plain = (max(column) for column in zip(*columns, strict=True))
            stored = self.dtype if name == "params" else self.compute
            # If few values differ (with clamped updates, say), plain code may be exact by luck.
            limit = 2 * max(plain, 1.5 * torch.finfo(stored).eps)
            if double:
                # 1 - beta ** step loses digits to cancellation; in float32 that is below the last bit.
                limit += torch.finfo(stored).eps / (1 - max(self.options.beta1, self.options.beta2))
            assert ours <= limit, f"{name}: error {ours:.3g}, plain code {plain:.3g}, limit {limit:.3g}"

    def check_untouched(self, result: dict[str, list[Tensor]], i: int) -> None:
        for name, tensors in result.items():
            if tensors:
                assert same_bits(tensors[i], getattr(self, name)[i]), f"{name}[{i}] changed"

    @staticmethod
    def check_frozen(name: str, stored: Tensor, old: Tensor, updated: np.ndarray) -> None:
        frozen = torch.from_numpy(~updated)
        assert same_bits(stored.view(-1)[frozen], old.view(-1)[frozen]), f"{name}: entries outside the mask changed"

    def check_ema(self, result, i, updated, truth_type, plain_type, errors) -> None:
        target = oracle.to_numpy(result["masters" if self.masters else "params"][i]).reshape(-1)
        old = oracle.to_numpy(self.emas[i]).reshape(-1)
        everywhere = np.ones_like(updated) if self.kind != "masked" or self.ema_everywhere else updated
        self.check_frozen("emas", result["emas"][i], self.emas[i], everywhere)
        decay = self.options.ema_decay
        exact, rough = (oracle.ema_step(old, target, decay, kind) for kind in (truth_type, plain_type))
        scale = np.abs(old) + np.abs(target)
        self.compare("emas", result["emas"][i], exact, rough, scale, everywhere, errors)

    @staticmethod
    def compare(name, stored, exact, rough, scale, where, errors) -> None:
        """Records the largest relative errors of ``stored`` and ``rough``; infinite and NaN entries have to agree."""
        value = oracle.to_numpy(stored).reshape(-1)[where].astype(exact.dtype)
        exact, rough, scale = exact[where], rough.reshape(-1)[where], scale[where]
        # If rounding decides whether a value overflows, both are right.
        finite = np.isfinite(exact) & np.isfinite(rough)
        special = ~np.isfinite(exact) & ~np.isfinite(rough)
        assert np.array_equal(value[special], exact[special], equal_nan=True), f"{name}: inf or NaN differ"
        with np.errstate(all="ignore"):
            scale = np.maximum(scale[finite], np.finfo(np.float32).tiny)
            ours = np.abs(value[finite] - exact[finite]) / scale
            plain = np.abs(rough[finite] - exact[finite]) / scale
        assert np.isfinite(ours).all(), f"{name}: not finite where it should be"
        if ours.size:
            errors.setdefault(name, []).append((float(ours.max()), float(plain.max())))


def _maybe(value, probability: float = 0.5, otherwise=None):
    return value() if np.random.rand() < probability else otherwise


def random_case(
    dtype: torch.dtype, numels: list[int], kind: str | None = None, packed: bool | None = None, **options
) -> AdamCase:
    """A call with a random set of features; ``options`` fixes some of AdamOptions."""
    kind = kind or str(np.random.choice(KINDS))
    masked, joint = kind == "masked", kind.startswith("joint")
    packed = masked and (np.random.rand() < 0.4 if packed is None else packed)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    drawn = AdamOptions(
        lr=10 ** np.random.uniform(-4, -2),
        beta1=float(np.random.choice([0.0, 0.5, 0.9])),
        beta2=float(np.random.choice([0.9, 0.999])),
        eps=float(np.random.choice([1e-8, 1e-3])),
        weight_decay=_maybe(lambda: 0.1, 0.5, 0.0),
        decoupled_weight_decay=bool(np.random.rand() < 0.5),
        maximize=bool(np.random.rand() < 0.3),
        clip_value=_maybe(lambda: float(np.random.uniform(0.1, 2.0)), 0.4),
        max_update=_maybe(lambda: 0.5, 0.3),
        retain_variance=joint and bool(np.random.rand() < 0.5),
        zero_nonfinite=bool(np.random.rand() < 0.3),
        # A power of two, like real loss scales, so that unscaling is exact.
        grad_scale=_maybe(lambda: 2.0 ** np.random.randint(-3, 12), 0.3),
        ema_decay=_maybe(lambda: float(np.random.choice([0.5, 0.999])), 0.5),
    )
    drawn = replace(drawn, **options)
    # Without decay half of the parameters start at zero, so that the update itself is compared.
    level = 0.0 if drawn.weight_decay == 0 and np.random.rand() < 0.5 else 1.0
    params = [(level * torch.randn(n, dtype=compute)).to(dtype) for n in numels]
    scale = drawn.grad_scale or 1.0
    present = lambda: [bool(np.random.rand() < 0.85) for _ in numels]  # noqa: E731
    grads = [(scale * torch.randn(n, dtype=compute)).to(dtype) if exists else None
             for n, exists in zip(numels, present(), strict=True)]  # fmt: skip
    forget = [(scale * torch.randn(n, dtype=compute)).to(dtype) if exists else None
              for n, exists in zip(numels, present(), strict=True)]  # fmt: skip
    steps = [float(np.random.choice([1, 2, 7, 1000])) for _ in numels]
    fresh = lambda i, value: value * (steps[i] > 1)  # noqa: E731
    squares = [fresh(i, torch.rand(n, dtype=compute)) for i, n in enumerate(numels)]
    masks = random_masks(numels, float(np.random.choice([0.02, 0.5, 0.95]))) if kind in ("masked", "joint") else None
    case = AdamCase(
        kind,
        dtype,
        drawn,
        params,
        grads,
        forget if joint else [],
        masks,
        steps,
        exp_avgs=[fresh(i, torch.randn(n, dtype=compute)) for i, n in enumerate(numels)] if drawn.beta1 else [],
        exp_avg_sqs=squares,
        max_exp_avg_sqs=_maybe(lambda: [s * 2 * torch.rand_like(s) for s in squares], 0.4, []),
        packed=packed,
    )
    if dtype in (torch.bfloat16, torch.float16) and np.random.rand() < 0.5:
        case.masters = [p.float() * (1 + 2**-12 * torch.rand(p.shape)) for p in params]
    if np.random.rand() < 0.5:
        kind_of_count = torch.int16 if np.random.rand() < 0.5 else torch.int32
        case.counts = [torch.randint(0, 50, (n,), dtype=kind_of_count) for n in numels]
    if drawn.ema_decay is not None:
        case.ema_everywhere = bool(np.random.rand() < 0.5)
        own = case.masters or params
        case.emas = [t.to(compute) + 0.1 * torch.randn(t.shape, dtype=compute) for t in own]
        if masked and not case.ema_everywhere:
            # Leaving the EMA of frozen entries unchanged is right only if it equals the parameter.
            selected = [torch.from_numpy(mask) for mask in masks]
            case.emas = [torch.where(k, e, t.to(compute)) for k, e, t in zip(selected, case.emas, own, strict=True)]
    if packed:
        case.packed_grads = bool(np.random.rand() < 0.5)
        case.packed_values = not case.ema_everywhere and bool(np.random.rand() < 0.5)
    return case
