"""NaFlex training data: the transform whose images have planned shapes, and the micro-batches of a step.

    naflex_plan.Plan          which shape each sample of a step has, and in which micro-batch it is
    PlannedTransform          an image -> its patches; `place` says for which slot
    rows, shards              decode the samples of a step, each with its slot
    PlannedCollate            the samples of a step -> a list of batches, the last one with ENDS_STEP

A worker makes the micro-batches of a step together, so a step is what it was without NaFlex: `batch_size` samples. Read
positions and the order of samples are the same as for other images.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from open_clip.transform import NaFlexEvalTransformFactory, NaFlexTransformFactory, collate_patches
from open_clip.transform.naflex import NaFlexTransform, lengths_of
from training import ranks
from training.batches import LOSS_SCALE
from training.data.loader import ENDS_STEP, Collate
from training.data.naflex_plan import NaFlexDataConfig, Plan, Shape, Slot, StepPlan, VariablePlan
from training.params import DataConfig, ModelConfig, NaFlexConfig, TrainConfig, read_section
from training.params.checks import trains

logger = logging.getLogger(__name__)

Factories = tuple[NaFlexTransformFactory, NaFlexEvalTransformFactory]  # for training and evaluation

SLOT = "__slot__"  # in a sample: its Slot


class PlannedTransform:
    """The training transform of a run with a plan. It converts an image to the shape of the slot given before.

    Args:
        factory: makes the transform of a shape.
        options, cfg: of the plan.
        data: batch_size, seed and length_bucketing are used.
    """

    def __init__(
        self, factory: NaFlexTransformFactory, options: NaFlexConfig, cfg: NaFlexDataConfig, data: DataConfig
    ) -> None:
        self.cfg = cfg
        self.is_variable = options.naflex_variable_batch
        self._factory = factory
        self._options = options
        self._data = data
        self._transforms: dict[Shape, NaFlexTransform] = {}
        self._current: NaFlexTransform | None = None

    @property
    def normalization(self) -> Any:
        return self._factory.normalization

    def make_plan(self, num_samples: int | None) -> StepPlan | VariablePlan:
        """Return the plan of a run. Rank 0 warns about steps without negatives and about an epoch that ends early.

        Args:
            num_samples: of an epoch over all ranks; None: only --naflex-num-train-image-tokens ends it.

        Raises:
            ValueError: an epoch has no step.
        """
        text_tokens = self._options.naflex_max_text_tokens or 0
        arguments = (self.cfg, self._data.batch_size, ranks.world().world_size, self._data.seed, text_tokens)
        plan: StepPlan | VariablePlan
        if self.is_variable:
            plan = VariablePlan(*arguments, num_samples=num_samples, loss_scale=self._options.naflex_loss_scale)
        else:
            plan = StepPlan(*arguments, is_sorted=self._data.length_bucketing)
        if isinstance(plan, VariablePlan) and not plan.schedule:
            raise ValueError(
                f"--naflex-variable-batch: {num_samples} samples and --naflex-num-train-image-tokens "
                f"{self.cfg.train_num_image_tokens} do not give one step of {self.cfg.train_seq_lens} patches per "
                "image. Use more data or patches."
            )
        if ranks.world().is_master:
            for warning in _plan_warnings(plan, num_samples):
                logger.warning("%s", warning)
        return plan

    def make_collate(self, collate: Collate, plan: Plan) -> PlannedCollate:
        return PlannedCollate(collate, plan, self._options.naflex_pad_multiple)

    def place(self, slot: Slot) -> None:
        """Choose the shape of the next images."""
        if slot.shape not in self._transforms:
            self._transforms[slot.shape] = self._factory(*slot.shape)
        self._current = self._transforms[slot.shape]

    def __call__(self, image: Any) -> Any:
        assert self._current is not None, "place comes first"
        return self._current(image)


def _plan_warnings(plan: StepPlan | VariablePlan, num_samples: int | None) -> Iterator[str]:
    cfg = plan.cfg
    if num_samples is not None and plan.lacks_samples(num_samples):
        yield (
            f"--naflex-num-train-image-tokens {cfg.train_num_image_tokens} is more than the patches of all "
            f"{num_samples} samples, so an epoch ends after these."
        )
    if isinstance(plan, VariablePlan) and (alone := plan.steps_without_negatives()):
        needed = max(cfg.batch_divisor, 2)
        divisor = f", or a --naflex-batch-divisor below {needed}" if needed > 2 else ""
        yield (
            f"--naflex-variable-batch: {alone} of {len(plan.schedule)} steps per epoch have a single sample, so their "
            "contrastive loss has no negatives. Use --naflex-max-tokens-per-batch "
            f"{needed * (max(cfg.train_seq_lens) + plan.text_tokens)} or more, which fits {needed} images of the "
            f"longest length{divisor}."
        )


class PlannedCollate:
    """Joins the samples of a step to its micro-batches.

    Args:
        collate: joins what a sample has besides its image.
        plan: gives the factor of the loss.
        pad_multiple: pad images to the longest one of the micro-batch, up to a multiple; None: to the planned length.
    """

    def __init__(self, collate: Collate, plan: Plan, pad_multiple: int | None) -> None:
        self.collate = collate
        self.plan = plan
        self.pad_multiple = pad_multiple

    def __call__(self, samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        ordered = sorted(samples, key=_micro_batch_of)
        groups = itertools.groupby(ordered, key=_micro_batch_of)
        batches = [self._join(list(group)) for _, group in groups]
        for batch in batches:
            batch[ENDS_STEP] = batch is batches[-1]
        return batches

    def _join(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        length = samples[0][SLOT].shape.seq_len
        others = [{key: sample[key] for key in sample if key not in ("image", SLOT)} for sample in samples]
        images = [sample["image"] for sample in samples]
        batch = self.collate(list(others)) or {}
        patches = collate_patches(images, length, self.pad_multiple, stack=self.collate.column)
        scale = self.plan.loss_scale(len(samples)) if isinstance(self.plan, VariablePlan) else None
        return {"image": patches, **batch, **({} if scale is None else {LOSS_SCALE: scale})}


def _micro_batch_of(sample: dict[str, Any]) -> int:
    return sample[SLOT].micro_batch


def planned(preprocess: Any) -> PlannedTransform | None:
    """Return a transform that has a plan; None for any other."""
    return preprocess if isinstance(preprocess, PlannedTransform) else None


def takes_any_shape(preprocess: Any) -> bool:
    """Return whether a transform keeps the aspect ratio of images."""
    return isinstance(preprocess, (PlannedTransform, NaFlexTransform, NaFlexTransformFactory))


def with_naflex(cfg: TrainConfig) -> ModelConfig:
    """Return the options of the model, with a NaFlex tower and NaFlex transforms if the run uses them."""
    if not cfg.naflex.use_naflex:
        return cfg.model
    implied: dict[str, Any] = {"force_naflex_vision": True, "aug_cfg": {**cfg.model.aug_cfg, "naflex": True}}
    return dataclasses.replace(cfg.model, **implied)


def plan_transforms(
    options: NaFlexConfig, data: DataConfig, visual: Any, transforms: Sequence[Any]
) -> list[Callable[[Any], Any]]:
    """Return the transforms of a run with --use-naflex: one with a plan for training, one of fixed length.

    Args:
        options: of NaFlex.
        data: of the data.
        visual: the image tower, which has a patch size and a length of its own.
        transforms: the factories for training and evaluation.

    Raises:
        ValueError: the transforms are not factories.
    """
    lengths = lengths_of(visual)
    return _plan(options, data, _check_factories(transforms), lengths["patch_size"], lengths["max_seq_len"])


def plan_script_transforms(args: Any, data: DataConfig, transforms: Sequence[Any]) -> Sequence[Callable[[Any], Any]]:
    """Return the transforms of a script's namespace: as from `plan_transforms` if it has `use_naflex`, else unchanged.

    The batches of a script cannot say where a step ends, so each is a step, as in open_clip's main branch.

    Args:
        args: the namespace.
        data: its data options.
        transforms: for training and evaluation.

    Raises:
        ValueError: the transforms are not factories, or the namespace asks for what batches of scripts cannot have.
    """
    options = read_section(NaFlexConfig, args)
    if not options.use_naflex:
        return transforms
    if trains(data) and not getattr(args, "naflex_variable_batch", True):
        raise ValueError(
            "use_naflex: the batches of get_data cannot tell a script which of them form a step. Set "
            "args.naflex_variable_batch = True, so that each is a step, or train with training.main."
        )
    if trains(data) and options.naflex_loss_scale != "none":
        raise ValueError(
            f"naflex_loss_scale={options.naflex_loss_scale!r}: the batches of get_data have no factor of the loss. Use "
            "'none' and scale the loss in the script, or train with training.main."
        )
    options = dataclasses.replace(options, naflex_variable_batch=True)
    factories = train, evaluation = _check_factories(transforms)
    return _plan(options, data, factories, train.patch_size, evaluation.max_seq_len)


def _plan(
    options: NaFlexConfig, data: DataConfig, factories: Factories, patch_size: Any, eval_seq_len: int | None
) -> list[Callable[[Any], Any]]:
    train, evaluation = factories
    cfg = NaFlexDataConfig.from_options(options, patch_size, eval_seq_len)
    return [PlannedTransform(train, options, cfg, data), evaluation(cfg.eval_seq_len, cfg.eval_patch_size)]


def _check_factories(transforms: Sequence[Any]) -> Factories:
    train, evaluation = transforms
    if not isinstance(train, NaFlexTransformFactory) or not isinstance(evaluation, NaFlexEvalTransformFactory):
        raise ValueError(
            f"--use-naflex needs NaFlex transforms, got {type(train).__name__} and {type(evaluation).__name__}. Create "
            'them with create_model_and_transforms(..., aug_cfg={"naflex": True}).'
        )
    return train, evaluation
