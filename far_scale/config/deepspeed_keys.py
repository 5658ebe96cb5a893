"""DeepSpeed keys that `train.deepspeed` refuses because other recipe keys set them, and the ZeRO stages of the others.

The keys that it accepts are the fields of `DeepSpeedSection`. tests/train/test_deepspeed_keys.py checks that these and
the refused ones are all keys of the installed DeepSpeed's `zero_optimization`.
"""

from __future__ import annotations

_FIXED = "far_scale needs DeepSpeed's default here; leave it out"
_NO_NATIVE_CHECKPOINTS = "far_scale writes its own checkpoints; leave it out"
_PACKS = "far_scale sets it from data.clips_per_pack or data.tokens_per_pack, and data.lanes; set those"
_PRECISION = "far_scale sets it from train.precision; set that"

SET_ELSEWHERE = {
    # Of zero_optimization.
    "stage": "far_scale sets it from train.zero_stage; set that",
    "stage3_param_persistence_threshold": "far_scale sets it from train.whole_below; set that",
    "param_persistence_threshold": "far_scale sets it from train.whole_below; set that",
    "memory_efficient_linear": "far_scale sets it to false, since that linear layer rounds differently; leave it out",
    "leaf_module": "far_scale gathers each block's weights in one go; leave it out",
    "stage3_module_granularity_threshold": "far_scale gathers each block's weights in one go; leave it out",
    "zero_quantized_nontrainable_weights": "far_scale trains all weights; leave it out",
    "compute_grad_norm": "far_scale needs the norm of every step's gradient; leave it out",
    "ignore_unused_parameters": _FIXED,
    "legacy_stage1": _FIXED,
    "override_module_apply": _FIXED,
    "parameter_alignment": _FIXED,
    "pipeline_loading_checkpoint": _FIXED,
    "contiguous_gradients": "without it ZeRO-2 of DeepSpeed 0.19.0 counts the last pack of a step only; leave it out",
    "round_robin_gradients": "it breaks DeepSpeed's map of the parameters, that EMA and checkpoints read; leave it out",
    "load_from_fp32_weights": _NO_NATIVE_CHECKPOINTS,
    "elastic_checkpoint": _NO_NATIVE_CHECKPOINTS,
    "stage3_gather_16bit_weights_on_model_save": "tools/export_checkpoint.py gathers the weights; leave it out",
    "stage3_gather_fp16_weights_on_model_save": "tools/export_checkpoint.py gathers the weights; leave it out",
    "save_muon_momentum_buffer_in_memory": "far_scale trains with AdamW; leave it out",
    "zenflow": "it needs an optimizer of DeepSpeed's own, far_scale trains with torch's AdamW; leave it out",
    "mics_shard_size": "newer versions of DeepSpeed have no MiCS; use zero_hpz_partition_size",
    "mics_hierarchical_params_gather": "newer versions of DeepSpeed have no MiCS; use zero_hpz_partition_size",
    "zeropp_loco_param": "newer versions of DeepSpeed have no LoCo; leave it out",
    "cpu_offload": "DeepSpeed calls it offload_optimizer now; set that",
    "cpu_offload_param": "DeepSpeed calls it offload_param now; set that",
    "cpu_offload_use_pin_memory": "DeepSpeed calls it pin_memory of offload_optimizer or offload_param now; set that",
    # Of DeepSpeed's whole configuration.
    "zero_optimization": "train.deepspeed has its keys directly; write them there",
    "train_batch_size": _PACKS,
    "train_micro_batch_size_per_gpu": _PACKS,
    "gradient_accumulation_steps": "it is data.lanes divided by the ranks; set data.lanes",
    "gradient_clipping": "far_scale sets it from optimizer.clip_norm; set that",
    "optimizer": "far_scale sets it from the optimizer section; set that",
    "scheduler": "far_scale sets it from optimizer.schedule and optimizer.warmup_steps; set those",
    "bf16": _PRECISION,
    "fp16": "far_scale trains in bf16 or fp32; set train.precision",
    "data_types": _PRECISION,
    "torch_autocast": _PRECISION,
    "activation_checkpointing": "far_scale sets it from train.activation_checkpointing; set that",
    "compile": "far_scale compiles the layers by train.compile; set that",
    "zero_allow_untested_optimizer": "far_scale sets it to true; leave it out",
    "zero_force_ds_cpu_optimizer": "far_scale sets it to false; leave it out",
    "steps_per_print": "far_scale logs by itself; set log.every",
    "wall_clock_breakdown": "use --profile",
    "flops_profiler": "use --profile",
    "wandb": "set log.wandb",
}
"""Refused keys, with the reason and the fix."""

_ZERO_1_2, _ZERO_2_3, _ZERO_3, _SHARDED = (1, 2), (2, 3), (3,), (1, 2, 3)
KEY_STAGES = {
    "zero_hpz_partition_size": _ZERO_3,
    "zero_quantized_weights": _ZERO_3,
    "zero_quantized_gradients": _ZERO_3,
    "sub_group_size": _ZERO_3,
    "stage3_prefetch_bucket_size": _ZERO_3,
    "stage3_max_live_parameters": _ZERO_3,
    "stage3_max_reuse_distance": _ZERO_3,
    "stage3_model_persistence_threshold": _ZERO_3,
    "stage3_use_all_reduce_for_fetch_params": _ZERO_3,
    "stage3_allgather_sequential": _ZERO_3,
    # ZeRO-1 and -2 sum the packs' gradients in bf16 when they offload, and keep all of them in main memory.
    "offload_optimizer": _ZERO_3,
    "offload_param": _ZERO_3,
    "log_trace_cache_warnings": _ZERO_3,
    "enable_sanity_checks": _ZERO_3,
    "reduce_scatter": _ZERO_2_3,
    "allgather_bucket_size": _ZERO_1_2,
    "allgather_partitions": _ZERO_1_2,
    "use_multi_rank_bucket_allreduce": _ZERO_1_2,
    "reduce_bucket_size": _SHARDED,
    "overlap_comm": _SHARDED,
    "communication_data_type": _SHARDED,
}
"""The ZeRO stages in which each accepted key has an effect."""
