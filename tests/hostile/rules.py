"""What a config.json may say, written down apart from the library: the oracle of damaged configs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

ABSENT = object()
Check = Callable[[Any], bool]


def whole(low: int, high: int) -> Check:
    return lambda x: type(x) is int and low <= x <= high


def number(low: float, high: float) -> Check:
    """A finite number; a bool is none."""
    return lambda x: type(x) in (int, float) and math.isfinite(x) and low <= x <= high


def positive(high: float) -> Check:
    return lambda x: number(0, high)(x) and x > 0


def optional(check: Check) -> Check:
    """null stands for the default."""
    return lambda x: x is ABSENT or x is None or check(x)


def one_of(*values: Any) -> Check:
    return lambda x: any(type(x) is type(value) and x == value for value in values)


def same(good: Any) -> Check:
    """The good value, as the weights need it. 2.0 may stand for 2."""
    if isinstance(good, bool) or not isinstance(good, int):
        return lambda x: type(x) is type(good) and x == good
    return lambda x: type(x) in (int, float) and x == good


def numbers(count: int, low: float, high: float) -> Check:
    return lambda x: isinstance(x, list) and len(x) == count and all(map(number(low, high), x))


def rope(parts: int) -> Check:
    """Even parts of a head of 8."""
    return lambda x: (
        isinstance(x, list)
        and len(x) == parts
        and all(type(n) is int and n > 0 and n % 2 == 0 for n in x)
        and sum(x) == 8
    )


def keep(config: dict[str, Any], *names: str) -> dict[str, Check]:
    return {name: same(config[name]) for name in names}


def epsilon(x: Any) -> bool:
    return positive(1)(x)


def rules(kind: str, component: str, config: dict[str, Any]) -> dict[str, Check]:
    """The check of every key that matters; `config` is the good one."""
    match kind, component:
        case "flux", "transformer":
            names = ("num_layers", "num_single_layers", "attention_head_dim", "num_attention_heads", "in_channels")
            more = ("joint_attention_dim", "pooled_projection_dim", "guidance_embeds")
            free = {"axes_dims_rope": rope(3), "patch_size": optional(one_of(1)), "out_channels": optional(one_of())}
            return keep(config, *names, *more) | free
        case "qwen", "transformer":
            names = ("num_layers", "attention_head_dim", "num_attention_heads", "in_channels", "joint_attention_dim")
            off = ("guidance_embeds", "zero_cond_t", "use_additional_t_cond", "use_layer3d_rope")
            return (
                keep(config, *names)
                | dict.fromkeys(off, lambda x: x is ABSENT or x is False or x is None)
                | {"axes_dims_rope": rope(3), "patch_size": optional(one_of(2))}
            )
        case "flux2", "transformer":
            names = ("num_layers", "num_single_layers", "attention_head_dim", "num_attention_heads", "in_channels")
            return keep(config, *names, "joint_attention_dim", "guidance_embeds") | {
                "axes_dims_rope": rope(4),
                "rope_theta": optional(number(1, 1e12)),
                "patch_size": optional(one_of(1)),
                "out_channels": optional(one_of()),
                "eps": optional(one_of(1e-6)),
                "mlp_ratio": optional(one_of(3.0, 3)),
                "timestep_guidance_channels": optional(one_of(256)),
            }
        case "flux", "text_encoder":
            names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings")
            return keep(config, *names) | {
                "num_attention_heads": one_of(1, 2, 5, 10),
                "hidden_act": optional(one_of("quick_gelu", "gelu")),
                "layer_norm_eps": optional(epsilon),
                "eos_token_id": optional(whole(0, 596)),
            }
        case "flux", "text_encoder_2":
            return keep(config, "vocab_size", "d_model", "d_ff", "num_layers", "num_heads", "d_kv") | {
                "relative_attention_num_buckets": optional(one_of(32)),
                "relative_attention_max_distance": optional(whole(9, 10**6)),
                "layer_norm_epsilon": optional(epsilon),
                "feed_forward_proj": optional(one_of("gated-gelu")),
            }
        case "qwen", "text_encoder":
            names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
            return keep(config, *names, "num_attention_heads", "num_key_value_heads") | {
                "rms_norm_eps": epsilon,
                "rope_theta": optional(positive(1e12)),
            }
        case "flux2", "text_encoder":
            names = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
            return keep(config, *names, "head_dim") | {
                "num_hidden_layers": whole(28, 308),  # of which 27 are read
                "rms_norm_eps": epsilon,
                "rope_theta": number(1, 1e12),
                "hidden_act": optional(one_of("silu")),
                "attention_bias": optional(one_of(False)),
                "use_sliding_window": optional(one_of(False)),
            }
        case "flux2", "vae":
            return keep(config, "block_out_channels", "layers_per_block", "latent_channels") | {
                "norm_num_groups": one_of(1, 2, 4),
                "batch_norm_eps": optional(epsilon),
                "sample_size": optional(whole(1, 2**16)),
                "patch_size": optional(lambda x: x == [2, 2]),
            }
        case "flux", "vae":
            return keep(config, "block_out_channels", "layers_per_block", "latent_channels") | {
                "norm_num_groups": one_of(1, 2, 4),
                "scaling_factor": positive(1e6),
                "shift_factor": number(-1e6, 1e6),
                "sample_size": optional(whole(1, 2**16)),
                "in_channels": optional(same(3)),
                "out_channels": optional(same(3)),
                "mid_block_add_attention": optional(same(True)),
            }
        case "qwen", "vae":
            return keep(config, "base_dim", "z_dim", "dim_mult", "num_res_blocks") | {
                "latents_mean": numbers(4, -1e6, 1e6),
                "latents_std": lambda x: numbers(4, 0, 1e6)(x) and min(x) > 0,
                "sample_size": optional(whole(1, 2**16)),
                "attn_scales": optional(lambda x: x == []),
            }
    raise AssertionError((kind, component))


SCHEDULER: dict[str, Check] = {
    "shift": optional(positive(1e3)),
    "use_dynamic_shifting": optional(lambda x: isinstance(x, bool)),
    "base_shift": optional(number(-20, 20)),
    "max_shift": optional(number(-20, 20)),
    "base_image_seq_len": optional(whole(1, 10**6)),
    "max_image_seq_len": optional(whole(1, 10**6)),
    "shift_terminal": optional(number(0, 0.999)),
}


def broken(checks: dict[str, Check], parsed: Any) -> str | None:
    """Which key of a config breaks its rule."""
    if not isinstance(parsed, dict):
        return "the file is no JSON object"
    for name, check in checks.items():
        if not check(parsed.get(name, ABSENT)):
            return f"{name} breaks its rule: {str(parsed.get(name, 'missing'))[:40]}"
    return None
