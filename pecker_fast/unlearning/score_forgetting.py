"""What SFD and PECKER share as methods: their networks, how these are sampled, and what their memory depends on."""

from dataclasses import replace

from ..diffusion import Sampler
from ..parallel import World
from .conditions import PromptRequest
from .options import ScoreForgettingOptions
from .protocol import MemoryPlan, Method
from .setting import Setting


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
        self.score = setting.trainable_score(problem.initial_score or problem.teacher)
        self.generator = setting.trainable(problem.initial_generator or problem.teacher)
        setting.lower_teacher()

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
