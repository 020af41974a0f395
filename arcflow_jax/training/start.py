"""The state that a run starts or resumes from: the teacher, another student, or its own checkpoint."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from arcflow_jax.checkpoints.student_formats import open_student
from arcflow_jax.checkpoints.training import Checkpoints, to_dicts
from arcflow_jax.errors import UserError
from arcflow_jax.networks.student import AdapterConfig, split_model
from arcflow_jax.parallel.mesh import sharded, state_shardings
from arcflow_jax.training.plan import Plan, abstract_state, initial_state
from arcflow_jax.training.state import TrainState


def starting_state(
    plan: Plan, base: nnx.State, key: jax.Array, checkpoints: Checkpoints, step: int | None = None
) -> TrainState:
    """The newest checkpoint's state, or that of `step`; without a checkpoint, that of training step 0.

    Args:
      base: the teacher's weights.
      key: of the run.

    Raises:
      UserError: if the checkpoint is missing, damaged, or of another optimizer; if the student that the recipe starts
        from does not fit.
    """
    if checkpoints.latest is not None or step is not None:
        return resume(plan, checkpoints, step)
    if plan.recipe.start_from:
        return from_student(plan)
    return initial_state(plan.graphdef, base, plan.adapter, key, plan.mesh, plan.optimizer)


def resume(plan: Plan, checkpoints: Checkpoints, step: int | None) -> TrainState:
    """The state of a checkpoint. Raises UserError as `starting_state` does."""
    like = sharded(plan.mesh, abstract_state(plan.adapter, plan.optimizer)).items()
    try:
        return TrainState.from_items(checkpoints.restore(like, step))
    except UserError as error:
        if other_optimizer(checkpoints, like["optimizer"], checkpoints.latest if step is None else step):
            run = checkpoints.run
            raise UserError(
                f"{run} was begun by an earlier version, whose optimizer state this version cannot read: begin a new "
                f"run from its EMA weights with --config.start_from={run} and a new --config.out"
            ) from error
        raise


def other_optimizer(checkpoints: Checkpoints, ours: Any, step: int | None) -> bool:
    """Whether a checkpoint's optimizer state has other parts than ours."""
    try:
        stored = checkpoints.manager.item_metadata(step).tree["optimizer"]
    except Exception:  # a checkpoint that is missing or damaged, which Orbax says in many ways
        return False
    return parts(stored) != parts(to_dicts(ours))


def parts(tree: Any) -> set[str]:
    """The leaves of a tree, by dotted path."""
    return {jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in jax.tree.leaves_with_path(tree)}


def from_student(plan: Plan) -> TrainState:
    """The state of training step 0 that begins with the EMA weights of the recipe's `start_from`.

    Raises:
      UserError: if there is no such student, it is of another base, or its adapter has another shape.
    """
    source = plan.recipe.start_from
    description, read = open_student(source, plan.directory)
    check_adapter(plan, description.adapter)
    shardings = state_shardings(plan.mesh, abstract_state(plan.adapter, plan.optimizer))
    start = jax.jit(lambda adapter: TrainState.create(adapter, plan.optimizer), out_shardings=shardings)
    return start(read(sharded(plan.mesh, plan.adapter), False))


def check_adapter(plan: Plan, theirs: AdapterConfig) -> None:
    """Raises UserError unless a student's adapter is, but for its dropout, what the recipe trains."""
    ours, source = plan.recipe.adapter, plan.recipe.start_from
    different = [
        f"{name} {getattr(theirs, name)} there and {getattr(ours, name)} here"
        for name in ("basis", "modes", "rank", "alpha")
        if getattr(theirs, name) != getattr(ours, name)
    ]
    if not different:
        _, _, abstract = split_model(plan.directory.student(theirs, plan.recipe.dtype))
        if odd := sorted(parts(abstract) ^ parts(plan.adapter)):
            different = [f"LoRA targets: {odd[0].removesuffix('.value')} is trained in one of them only"]
    if different:
        raise UserError(
            f"start_from {source} has another adapter than the recipe: {', '.join(different)}; set "
            "--config.adapter.… to the student's values"
        )
