"""MaskedAdam and torch.optim.Adam while parameter groups, state and parameters are edited at random between steps."""

import copy
import random

import pytest
import torch
from torch import nn

import pecker_fast as pf
from tests.optim_oracle import make_params

LR = 0.1


class Fuzz:
    """MaskedAdam and torch.optim.Adam on twins of the same parameters, edited alike."""

    def __init__(self) -> None:
        options = {"lr": LR, "weight_decay": random.choice([0.0, 0.1]), "amsgrad": random.random() < 0.3}
        options["decoupled_weight_decay"] = random.random() < 0.5
        base = [p.detach() for p in make_params()] + [torch.randn(1).double()]
        self.params = [[nn.Parameter(p.clone()) for p in base] for _ in range(2)]
        in_group = [self.params[k][:5] for k in range(2)]
        self.optimizers = [
            kind(ps, **options) for kind, ps in zip((pf.MaskedAdam, torch.optim.Adam), in_group, strict=True)
        ]

    def groups(self, which: int) -> list[dict]:
        return self.optimizers[which].param_groups

    def members(self, which: int) -> list[nn.Parameter]:
        return [p for group in self.groups(which) for p in group["params"]]

    def outside(self) -> list[int]:
        members = set(map(id, self.members(0)))
        return [i for i, p in enumerate(self.params[0]) if id(p) not in members]

    def each(self, edit) -> None:
        """``edit(optimizer, params)`` on both sides, with the same random numbers."""
        seed = random.randrange(2**32)
        for optimizer, params in zip(self.optimizers, self.params, strict=True):
            random.seed(seed)
            torch.manual_seed(seed)
            edit(optimizer, params)

    def step(self) -> None:
        grads = []
        for param in self.params[0]:
            grad = torch.randn_like(param)
            if random.random() < 0.3:
                grad = grad.contiguous()
            if random.random() < 0.2:
                grad = torch._neg_view(grad)
            grads.append(None if random.random() < 0.15 else grad)
        for params in self.params:
            for param, grad in zip(params, grads, strict=True):
                param.grad = None if grad is None else grad.resolve_neg().clone()
        for param, grad in zip(self.params[0], grads, strict=True):
            param.grad = grad
        for optimizer in self.optimizers:
            optimizer.step()

    # Edits of the groups.

    def take_out(self) -> None:
        def edit(optimizer, params):
            group = random.choice(optimizer.param_groups)
            held = list(group["params"])
            if held:
                held.pop(random.randrange(len(held)))
            if random.random() < 0.5:
                group["params"] = held
            else:
                group["params"][:] = held

        self.each(edit)

    def put_in(self) -> None:
        free = self.outside()
        if free:
            index = random.choice(free)
            self.each(lambda optimizer, params: random.choice(optimizer.param_groups)["params"].append(params[index]))

    def new_group(self) -> None:
        free = self.outside()
        if free:
            index = random.choice(free)
            self.each(lambda optimizer, params: optimizer.add_param_group({"params": [params[index]], "lr": 0.03}))

    def rebuild_groups(self) -> None:
        def edit(optimizer, params):
            members = [p for group in optimizer.param_groups for p in group["params"]]
            cut = random.randrange(len(members) + 1)
            old = optimizer.param_groups[0]
            optimizer.param_groups = [{**old, "params": members[:cut]}, {**old, "params": members[cut:], "lr": 0.05}]

        self.each(edit)

    def drop_group(self) -> None:
        if len(self.groups(0)) > 1:
            self.each(
                lambda optimizer, params: optimizer.param_groups.pop(random.randrange(len(optimizer.param_groups)))
            )

    def reorder(self) -> None:
        self.each(lambda optimizer, params: random.shuffle(random.choice(optimizer.param_groups)["params"]))

    def replace_parameter(self) -> None:
        members = self.members(0)
        if not members:
            return
        index = next(i for i, p in enumerate(self.params[0]) if p is random.choice(members[:1]))

        def edit(optimizer, params):
            new = nn.Parameter(params[index].detach().clone())
            for group in optimizer.param_groups:
                group["params"] = [new if p is params[index] else p for p in group["params"]]
            optimizer.state.pop(params[index], None)
            params[index] = new

        self.each(edit)

    def change_options(self) -> None:
        def edit(optimizer, params):
            group = random.choice(optimizer.param_groups)
            group["lr"] = random.choice([0.01, 0.2, torch.tensor(0.07, dtype=torch.float64)])
            group["betas"] = random.choice([(0.9, 0.99), (0.5, 0.9)])
            group["weight_decay"] = random.choice([0.0, 0.2])
            group["maximize"] = random.random() < 0.3
            group["eps"] = random.choice([1e-8, 1e-4])

        self.each(edit)

    # Edits of the state.

    def edit_state(self) -> None:
        def edit(optimizer, params):
            started = [p for p in params if optimizer.state.get(p)]
            if not started:
                return
            param = random.choice(started)
            state = optimizer.state[param]
            kind = random.randrange(8)
            if kind == 0:
                optimizer.state.clear()
            elif kind == 1:
                del optimizer.state[param]
            elif kind == 2:
                optimizer.state[param] = {key: value.clone() for key, value in state.items()}
            elif kind == 3:
                key = random.choice(list(state))
                state[key] = state[key].clone()
            elif kind == 4:
                state["exp_avg"].mul_(0.5)
            elif kind == 5:
                state["step"] = torch.tensor(float(random.randrange(1, 9)))
            elif kind == 6:
                state["exp_avg"].data = torch.randn(param.shape, dtype=param.dtype)
            else:
                optimizer.state = copy.copy(optimizer.state)

        self.each(edit)

    def load(self) -> None:
        for which, optimizer in enumerate(self.optimizers):
            # Parameters that have left their group keep a state that no state dict can name.
            members = set(map(id, self.members(which)))
            for param in list(optimizer.state):
                if id(param) not in members:
                    del optimizer.state[param]
        self.each(lambda optimizer, params: optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict())))

    # Edits of the parameters.

    def edit_parameter(self) -> None:
        def edit(optimizer, params):
            param = random.choice(params)
            kind = random.randrange(5)
            with torch.no_grad():
                if kind == 0:
                    param.mul_(0.5)
                elif kind == 1:
                    param.data = param.data.clone()
                elif kind == 2:
                    param.data = param.data.contiguous()
                elif kind == 3 and param.dim() == 4:
                    param.data = param.data.to(
                        memory_format=random.choice([torch.channels_last, torch.contiguous_format])
                    )
                elif kind == 4 and param.dim() == 2:
                    param.data = param.data.t().contiguous().t()
                else:
                    param.requires_grad_(not param.requires_grad)
                    param.grad = None

        self.each(edit)
        for params in self.params:
            for param in params:
                param.requires_grad_(True)

    def check(self) -> None:
        ours, theirs = self.optimizers
        for i, (p, q) in enumerate(zip(*self.params, strict=True)):
            assert torch.allclose(p, q, rtol=1e-9, atol=1e-10), f"parameter {i}"
            state, other = ours.state.get(p, {}), theirs.state.get(q, {})
            assert state.keys() == other.keys(), f"state {i}"
            for key, value in other.items():
                assert torch.allclose(state[key], value.to(state[key].dtype), rtol=1e-9, atol=1e-12), f"{key} {i}"


EDITS = [name for name, value in vars(Fuzz).items() if callable(value) and not name.startswith("_")]
EDITS = [name for name in EDITS if name not in ("groups", "members", "outside", "each", "step", "check")]


@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.slow) for part in range(1, 5))])
def test_random_edits_between_steps(part, seed):
    """100 of 500 random sequences."""
    for sequence in range(100):
        random.seed(seed + sequence)
        torch.manual_seed(seed + sequence)
        fuzz = Fuzz()
        log = []
        try:
            for _ in range(30):
                name = random.choice([*EDITS, *["step"] * 8])
                log.append(name)
                getattr(fuzz, name)()
            log.append("step")
            fuzz.step()
            fuzz.check()
        except Exception as error:
            raise AssertionError(f"sequence {sequence}: {log}") from error
