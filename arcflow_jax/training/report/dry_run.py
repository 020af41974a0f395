"""What a run would do: the recipe with all overrides, how much it trains, memory, and the mesh."""

from __future__ import annotations

import json

from arcflow_jax.errors import first_few
from arcflow_jax.training.plan import OFFLOADED, Plan, bytes_per_device
from arcflow_jax.training.recipe import Recipe


def report(recipe: Recipe) -> str:
    """The text that `arcflow train --dry-run` prints. Loads no weights and writes nothing.

    Raises:
      UserError: if the model or the prompts do not fit the recipe.
    """
    plan = Plan.make(recipe)
    recipe = plan.recipe
    trained, whole = plan.trained_and_whole()
    sizes = {name: bytes_per_device(plan.mesh, state) for name, state in plan.held.items()}
    tokens = first_few([f"{rows} × {columns}" for rows, columns in plan.grids.values()])
    memory = [*sizes.items(), ("total", sum(sizes.values()))]
    if recipe.offload_optimizer:
        away = sum(sizes[name] for name in OFFLOADED)
        memory.append(("of that, in host memory except during the update", away))
    return "\n".join(
        [
            json.dumps(recipe.resolved(), indent=2),
            "",
            f"parameters  teacher {whole:,}, trained {trained:,}: {100 * trained / whole:.2f} %",
            f"prompts     {plan.prompts}; {recipe.batch} in a training step, {tokens} tokens each",
            f"mesh        {', '.join(f'{name} {size}' for name, size in plan.mesh.shape.items())}: "
            f"{plan.mesh.size} × {plan.mesh.devices.flat[0].device_kind}",
            f"remat       {plan.remat}" + (", chosen by memory" if recipe.remat == "auto" else ""),
            "memory of one device, computed from shapes and shardings:",
            *(f"  {name:14} {size / 2**30:9.3f} GiB" for name, size in memory),
            "activations and XLA's temporary buffers come on top: arcflow compile-report counts those",
        ]
    )
