"""Arguments of transformers' `TrainingArguments` that MLX does not need, that are refused, and that have a newer name.

Each class holds one group. `MLXTrainingArguments` inherits all three, so that scripts and `HfArgumentParser` find every
name. The help text of a refused argument is the reason, and what to do instead.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


def refused(reason: str, default: Any = None) -> Any:
    """Return the field of an argument that only its default value passes."""
    return field(default=default, metadata={"help": reason}, repr=False)


@dataclass(kw_only=True)
class IgnoredArguments:
    """Arguments without an effect on MLX. Any value is accepted, because none would change the trained model."""

    # One process computes and reads the data. MLX finds the device.
    use_cpu: bool = False
    no_cuda: bool = False
    use_mps_device: bool = False
    local_rank: int = -1
    ddp_backend: str | None = None
    ddp_broadcast_buffers: bool | None = None
    ddp_bucket_cap_mb: int | None = None
    ddp_find_unused_parameters: bool | None = None
    ddp_static_graph: bool | None = None
    ddp_timeout: int = 1800
    dataloader_in_order: bool = True
    dataloader_multiprocessing_context: str | None = None
    dataloader_num_workers: int = 0
    dataloader_persistent_workers: bool = False
    dataloader_pin_memory: bool = True
    dataloader_prefetch_factor: int | None = None
    eval_accumulation_steps: int | None = None
    eval_use_gather_object: bool = False
    # MLX has its own compiler, kernels and memory cache.
    fp16_backend: str | None = None
    fp16_opt_level: str | None = None
    half_precision_backend: str | None = None
    jit_mode_eval: bool = False
    tf32: bool | None = None
    torch_compile: bool = False
    torch_compile_backend: str | None = None
    torch_compile_mode: str | None = None
    torch_empty_cache_steps: int | None = None
    torchdynamo: str | None = None
    use_ipex: bool = False
    use_legacy_prediction_loop: bool = False
    xpu_backend: str | None = None
    # Evaluation computes in the dtype of the model, which is at least as accurate.
    bf16_full_eval: bool = False
    fp16_full_eval: bool = False
    # Checkpointed layers are recomputed exactly, whatever the options of torch's implementation.
    activation_checkpointing_kwargs: dict[str, Any] | str | None = None
    gradient_checkpointing_kwargs: dict[str, Any] | str | None = None
    # A training always does this: it averages over the labels of all ranks, stops at a loss that is not finite, logs
    # tokens, speed and memory, resumes where it stopped, seeds all random numbers, and overwrites its checkpoints.
    average_tokens_across_devices: bool = True
    full_determinism: bool = False
    restore_callback_states_from_checkpoint: bool = False
    hub_always_push: bool = False
    ignore_data_skip: bool = False
    include_tokens_per_second: bool | None = None
    log_on_each_node: bool = True
    logging_nan_inf_filter: bool = True
    overwrite_output_dir: bool = False
    skip_memory_metrics: bool = True
    # ESM models have no cache of past states.
    use_cache: bool = False
    # Scripts read these. A trainer does not.
    do_train: bool = False
    do_eval: bool = False
    do_predict: bool = False
    log_level: str = "passive"
    log_level_replica: str = "warning"
    ray_scope: str | None = None
    resume_from_checkpoint: str | None = None


@dataclass(kw_only=True)
class RefusedArguments:
    """Arguments that would change the training and are not supported. Other values than the default are refused."""

    accelerator_config: dict[str, Any] | str | None = refused("Leave it out: mlx.launch starts the ranks.")
    auto_find_batch_size: bool = refused(
        "Set per_device_train_batch_size, or batch_tokens, which limits the memory of a batch.", False
    )
    batch_eval_metrics: bool = refused("Leave it out: compute_metrics gets all predictions at once.", False)
    debug: str = refused("Leave it out: a loss that is not finite stops a training and names the items.", "")
    deepspeed: dict[str, Any] | str | None = refused("Leave it out: mlx.launch shares the batches among ranks.")
    dispatch_batches: bool | None = refused("Leave it out: each rank reads its own batches.")
    enable_jit_checkpoint: bool = refused("Lower save_steps: a kill loses only the steps since a checkpoint.", False)
    eval_do_concat_batches: bool = refused("Leave it out: predictions are one array in the order of the data.", True)
    fsdp: str | None = refused("Leave it out: every rank holds the whole model.")
    fsdp_config: dict[str, Any] | str | None = refused("Leave it out: every rank holds the whole model.")
    fsdp_min_num_params: int = refused("Leave it out: every rank holds the whole model.", 0)
    fsdp_transformer_layer_cls_to_wrap: str | None = refused("Leave it out: every rank holds the whole model.")
    liger_kernel_config: dict[str, Any] | str | None = refused("Leave it out: these kernels are for torch on GPUs.")
    mp_parameters: str = refused("Leave it out: every rank holds the whole model.", "")
    neftune_noise_alpha: float | None = refused("Override compute_loss, and add the noise to inputs_embeds there.")
    optim_target_modules: list[str] | None = refused("Freeze the other parameters, or add LoRA adapters.")
    parallelism_config: str | None = refused("Leave it out: mlx.launch shares the batches among ranks.")
    past_index: int = refused("Leave it out: ESM models have no cache of past states.", -1)
    save_on_each_node: bool = refused("Copy the output folder: rank 0 alone writes.", False)
    save_safetensors: bool = refused("Leave it out: weights are always written as safetensors.", True)
    sharded_ddp: str = refused("Leave it out: every rank holds the whole model.", "")
    split_batches: bool | None = refused("Divide per_device_train_batch_size by the number of ranks.")
    tpu_metrics_debug: bool = refused("Leave it out: MLX does not run on TPUs.", False)
    tpu_num_cores: int | None = refused("Leave it out: MLX does not run on TPUs.")
    use_liger_kernel: bool = refused("Leave it out: these kernels are for torch on GPUs.", False)


@dataclass(kw_only=True)
class OlderArguments:
    """Arguments of earlier versions of transformers whose meaning a newer argument has. `NEWER` names that one."""

    adafactor: bool = False
    evaluation_strategy: str | None = None
    group_by_length: bool = False
    include_inputs_for_metrics: bool = False
    per_gpu_eval_batch_size: int | None = None
    per_gpu_train_batch_size: int | None = None
    push_to_hub_model_id: str | None = None
    push_to_hub_token: str | None = field(default=None, repr=False)


# The newer name of each older argument, and the value that True stands for.
NEWER: dict[str, tuple[str, Any]] = {
    "adafactor": ("optim", "adafactor"),
    "evaluation_strategy": ("eval_strategy", None),
    "group_by_length": ("train_sampling_strategy", "group_by_length"),
    "include_inputs_for_metrics": ("include_for_metrics", ["inputs"]),
    "per_gpu_eval_batch_size": ("per_device_eval_batch_size", None),
    "per_gpu_train_batch_size": ("per_device_train_batch_size", None),
    "push_to_hub_model_id": ("hub_model_id", None),
    "push_to_hub_token": ("hub_token", None),
}
