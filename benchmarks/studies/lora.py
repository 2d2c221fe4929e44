"""A rival of patches: SFD whose generator is trained through low-rank adapters of all its layers (LoRA)."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from pecker_fast.unlearning import Setting
from pecker_fast.unlearning.distillation import DistillationPhase
from pecker_fast.unlearning.options import ScoreForgettingOptions
from pecker_fast.unlearning.score_forgetting import ScoreForgetting
from pecker_fast.unlearning.streams import derived_seed


@dataclass(frozen=True)
class LoraOptions(ScoreForgettingOptions):
    """Options of SFD, and the rank."""

    rank: int = 4
    """Rank of the update of every convolution and linear layer of the generator."""


class LoraSFD(ScoreForgetting):
    """SFD on adapters of theta; psi is trained whole."""

    name = "lora"
    Options = LoraOptions

    def __init__(self, setting: Setting, options: LoraOptions) -> None:
        from peft import LoraConfig, inject_adapter_in_model

        super().__init__(setting, options)
        layers = [name for name, module in self.generator.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derived_seed(setting.compute.seed, "adapter"))
            config = LoraConfig(r=options.rank, lora_alpha=options.rank, target_modules=layers)
            self.generator = inject_adapter_in_model(config, self.generator)
        self.phases.append(
            DistillationPhase(
                setting,
                options,
                self.score,
                self.generator,
                name="forget",
                iterations=options.max_train_steps,
                score_learning_rate=options.score_learning_rate,
            )
        )

    def _adapter(self) -> Iterator[nn.Parameter]:
        return (param for param in self.generator.parameters() if param.requires_grad)

    def adapter_bytes(self) -> int:
        """Bytes of the adapters' weights."""
        return sum(param.nbytes for param in self._adapter())

    def merged(self) -> nn.Module:
        """A network of the generator's architecture with the adapters added to its weights."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        network = copy.deepcopy(self.generator)
        for module in network.modules():
            if isinstance(module, BaseTunerLayer):
                module.merge()
        state = {name.replace(".base_layer", ""): value for name, value in network.state_dict().items()}
        result = copy.deepcopy(self.setting.problem.teacher)
        result.load_state_dict({name: state[name] for name in result.state_dict()})
        return result
