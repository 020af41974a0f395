"""The authors' adapter export: head, output norm and LoRA of a student, without its teacher (DESIGN §5).

The LoRA names follow from the teacher's own table: a linear layer `x` there has `x.lora_A.weight` [r, in] and
`x.lora_B.weight` [out, r] here.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from arcflow_jax.convert.engine import Tensor
from arcflow_jax.convert.rules import LINEAR, Rule, canonical, linear, pattern

HEAD = (
    *linear("norm_out.linear", "head.norm_out.linear"),
    *linear("proj_out_means", "head.proj_out_means"),
    *linear("proj_out_logweights", "head.proj_out_logweights"),
    *linear("proj_out_loggamma", "head.proj_out_loggamma"),
)


@dataclasses.dataclass(frozen=True)
class AdapterTable:
    """The rules for the adapter of the teacher whose own table is `base`."""

    base: Any

    # Some exports carry the module's name in the pipeline
    ALIASES = {"transformer": ""}  # noqa: RUF012

    @property
    def RULES(self) -> tuple[Rule, ...]:
        lora = []
        for rule in self.base.RULES:
            if rule.form is LINEAR and rule.target.startswith("backbone."):
                source, target = rule.source.removesuffix(".weight"), rule.target.removesuffix(".kernel")
                lora.append(Rule(f"{source}.lora_A.weight", f"{target}.lora.a", LINEAR))
                lora.append(Rule(f"{source}.lora_B.weight", f"{target}.lora.b", LINEAR))
        return (*HEAD, *lora)

    def lora(self, source: Mapping[str, Tensor], layers: Iterable[str]) -> tuple[int, tuple[str, ...]]:
        """The rank of an export's LoRA, 0 if it has none, and which of the backbone's linear layers it is of.

        The rank is that of most tensors: `engine.check` names those that have another.
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
        # A stack after the layers that have a number of their own, because its pattern fits those as well
        for layer, regex in sorted(wanted.items(), key=lambda item: "layer" in item[1].groupindex):
            for name in [name for name in left if regex.fullmatch(name)]:
                ranks.update(left.pop(name).shape[:1])
                targets.add(layer)
        rank = ranks.most_common(1)[0][0] if ranks else 0
        return rank, tuple(layer for layer in wanted if layer in targets)
