"""What SFD and PECKER share as methods: their networks, how these are sampled, and what their memory depends on."""

from dataclasses import replace

from torch import nn

from ..diffusion import Sampler
from ..parallel import World
from .conditions import PromptRequest
from .options import ScoreForgettingOptions
from .protocol import MemoryPlan, Method
from .setting import Setting
from .shared_weights import SharedWeights


def process_share(name: str, count: int, processes: int) -> int:
    """A process's share of ``count`` samples. ValueError, naming ``name``, if they cannot be shared equally."""
    World(size=processes).check_shares(name, count)
    return count // processes


class ScoreForgetting(Method):
    """Base of the methods that distil the teacher into a one-step generator while it forgets."""

    Options = ScoreForgettingOptions
    forgets_prompts = True
    shards = True
    shards_without = ("cuda_graphs", "destroy", "relabel")
    trains_adapters = True
    trains_low_precision = True

    def __init__(self, setting: Setting, options: ScoreForgettingOptions) -> None:
        super().__init__(setting, options)
        problem, world = setting.problem, setting.compute.world
        options.check(problem.schedule.num_train_timesteps)
        if options.relabel and isinstance(problem.request, PromptRequest):
            raise ValueError(
                "relabel is true, but the request has prompts: expected false, and the method relabel on the result"
            )
        world.check_shares("train_batch_size", options.train_batch_size)
        world.check_shares("forget_batch_size", options.forget_samples)
        # By default both start as the teacher, the pretrained average.
        initial = {"score": problem.initial_score, "generator": problem.initial_generator}
        shared = [name for name in self.confined(options) if self._can_share(name, initial[name])]
        networks = {}
        for name, make in (("score", setting.trainable_score), ("generator", setting.trainable)):
            if name not in shared:
                networks[name] = make(initial[name] or problem.teacher)
        if setting.placement.share_weights and not shared:
            raise ValueError(
                "share_weights is set, but no network that one mask confines starts as the teacher: expected "
                "score_density below 1 without initial_score, or neither distilled nor initial_generator"
            )
        setting.lower_teacher()
        self.shared = SharedWeights(problem.teacher, shared) if shared else None
        networks |= self.shared.networks if shared else {}
        self.score, self.generator = networks["score"], networks["generator"]

    @classmethod
    def confined(cls, options: ScoreForgettingOptions) -> list[str]:
        """Which of "score" and "generator" are trained within one mask throughout."""
        return []

    def _can_share(self, name: str, network: nn.Module | None) -> bool:
        """Whether a network, which is confined to a mask, shares the teacher's weights: ``network`` is what it starts
        from, if not the teacher."""
        problem, placement = self.setting.problem, self.setting.placement
        if not placement.share_weights:
            return False
        own = {param.dtype for param in problem.teacher.parameters()}
        teacher = {placement.teacher_dtype} if placement.teacher_dtype is not None else own
        dtype = placement.weights_dtype
        if teacher != {dtype}:
            raise ValueError(
                f"share_weights is set, but the teacher is {', '.join(map(str, teacher))} and weights_dtype {dtype}: "
                "expected the same"
            )
        return self.setting.starts_as_teacher(name, network)

    @classmethod
    def rehearsal_options(cls, options: ScoreForgettingOptions, processes: int) -> ScoreForgettingOptions:
        train = process_share("train_batch_size", options.train_batch_size, processes)
        forget = options.forget_batch_size
        return replace(
            options,
            train_batch_size=train,
            forget_batch_size=None if forget is None else process_share("forget_batch_size", forget, processes),
            # More than two micro-batches take no more memory at a time.
            gradient_accumulation_steps=min(2, options.gradient_accumulation_steps),
        )

    def memory_plan(self) -> MemoryPlan:
        return self.phases[-1].memory_plan()

    @property
    def sampler(self) -> Sampler:
        return Sampler("one_step", t_init=self.options.t_init)
