"""The authors' adapter export: head, output norm and LoRA of a student, without its base model.

The LoRA names follow from the table of the base model: a linear layer `x` has `x.lora_A.weight` [r, in] and
`x.lora_B.weight` [out, r].
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from arcflow_jax.convert.engine import Tensor
from arcflow_jax.convert.rules import Rule, canonical, linear, pattern

HEAD = (
    *linear("norm_out.linear", "head.norm_out.linear"),
    *linear("proj_out_means", "head.proj_out_means"),
    *linear("proj_out_logweights", "head.proj_out_logweights"),
    *linear("proj_out_loggamma", "head.proj_out_loggamma"),
    *linear("proj_out_coefficients", "head.proj_out_coefficients"),  # Legendre, which the authors do not have
)


@dataclasses.dataclass(frozen=True)
class AdapterTable:
    """The table of the adapters of a base model, whose own table is `base`."""

    base: Any

    # Some exports prefix the name that the module has in the pipeline
    ALIASES = {"transformer": ""}  # noqa: RUF012

    @property
    def RULES(self) -> tuple[Rule, ...]:
        lora = []
        for rule in self.base.RULES:
            if rule.form.lora is not None and rule.target.startswith("backbone."):
                source, target = rule.source.removesuffix(".weight"), rule.target.removesuffix(".kernel")
                for part, letter, form in zip("ab", "AB", rule.form.lora, strict=True):
                    lora.append(Rule(f"{source}.lora_{letter}.weight", f"{target}.lora.{part}", form))
        return (*HEAD, *lora)

    def lora(self, source: Mapping[str, Tensor], layers: Iterable[str]) -> tuple[int, tuple[str, ...]]:
        """The LoRA rank of an export, 0 if it has no LoRA, and which linear layers of the backbone have LoRA.

        The rank is that of most tensors. `engine.check` names the tensors with another rank.
        """
        rules = [(rule.source, pattern(rule.target)) for rule in self.RULES if rule.target.endswith(".lora.a")]
        wanted = {
            layer: pattern(name.format(**match.groupdict(), layer="{layer}"))
            for layer in layers
            for name, regex in rules
            if (match := regex.fullmatch(f"backbone.{layer}.lora.a"))
        }
        left = {canonical(self, name): tensor for name, tensor in source.items()}
        ranks: Counter[int] = Counter()
        targets = set()
        # Stacks last, because their patterns also match layers that are stored under a number of their own
        for layer, regex in sorted(wanted.items(), key=lambda item: "layer" in item[1].groupindex):
            for name in [name for name in left if regex.fullmatch(name)]:
                ranks.update(left.pop(name).shape[:1])
                targets.add(layer)
        rank = ranks.most_common(1)[0][0] if ranks else 0
        return rank, tuple(layer for layer in wanted if layer in targets)
