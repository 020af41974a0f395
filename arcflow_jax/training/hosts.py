"""Whether the processes of a run see the same prompts, recipe and model."""

from __future__ import annotations

from arcflow_jax.parallel.together import check_same
from arcflow_jax.training.plan import Plan

# Of a recipe; each host may have its own copy
PLACES = {"model", "prompts", "images", "references", "embeddings", "start_from"}


def check_plan(plan: Plan) -> None:
    """Raises UserError in all processes if one has other prompts, another recipe or another model than the first."""
    prompts = plan.prompts
    check_same(
        {
            f"the prompts, of which the first process has {len(prompts.texts)},": [prompts.texts, prompts.sizes],
            "the settings of the recipe": {k: v for k, v in plan.recipe.resolved().items() if k not in PLACES},
            "the weights of the model": plan.directory.fingerprint,
        }
    )
