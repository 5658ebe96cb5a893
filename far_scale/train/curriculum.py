"""The stages of a run; a recipe without a curriculum has one."""

from __future__ import annotations

from dataclasses import dataclass

from far_scale.config.recipe import Recipe
from far_scale.config.schema import DataSection, ModelSection
from far_scale.data.frame_counts import clip_tokens
from far_scale.data.loader.packing import PackingConfig
from far_scale.model import FARConfig
from far_scale.model.layout import FrameLayout


@dataclass(frozen=True)
class Stage:
    """A stage.

    Attributes:
        index: from 0.
        name: from the recipe, or stage-1, stage-2, ...
        first: steps of the run before it.
        steps: of the stage.
        config: the model's configuration; stages differ only in the window.
        model, data: the recipe's sections with the stage's values.
        learning_rate_scale: factor on the learning rate of the recipe's schedule.
    """

    index: int
    name: str
    first: int
    steps: int
    config: FARConfig
    model: ModelSection
    data: DataSection
    learning_rate_scale: float

    @property
    def end(self) -> int:
        """Steps of the run at its end."""
        return self.first + self.steps

    def layout(self, clip_frames: tuple[int, ...]) -> FrameLayout:
        """The layout of a pack of clips with these numbers of frames."""
        _, height, width = self.data.latent_shape
        return self.config.layout(clip_frames, (height, width))

    def clip_tokens(self, frames: int) -> int:
        """Tokens of a clip with this number of frames."""
        _, height, width = self.data.latent_shape
        model = self.model
        return clip_tokens(frames, model.window, model.patch, model.context_patch, height, width)

    def packing(self, seed: int) -> PackingConfig:
        """How the stage's samples are packed in a run with this seed."""
        return PackingConfig(
            lanes=self.data.lanes,
            frames=self.data.frames,
            frame_stride=self.data.frame_stride,
            shuffle_window=self.data.shuffle_window,
            seed=seed,
            clips_per_pack=self.data.clips_per_pack,
            tokens_per_pack=self.data.tokens_per_pack,
            tokens_of=self.clip_tokens,
            stage=self.index,
            max_damaged=self.data.max_damaged_samples,
        )


def stages(recipe: Recipe) -> list[Stage]:
    """The stages of `recipe`, in order."""
    plan: list[Stage] = []
    for index, sections in enumerate(recipe.stages()):
        stage = sections.stage
        plan.append(
            Stage(
                index=index,
                name=stage.name or f"stage-{index + 1}",
                first=plan[-1].end if plan else 0,
                steps=stage.steps,
                config=sections.model.far_config(),
                model=sections.model,
                data=sections.data,
                learning_rate_scale=stage.learning_rate_scale,
            )
        )
    return plan


def stage_of(plan: list[Stage], step: int) -> Stage:
    """The stage that trains step `step` (from 0)."""
    return next(stage for stage in plan if step < stage.end)
