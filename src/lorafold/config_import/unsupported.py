"""Keys of other tools that have no counterpart in a recipe, with the reason or advice. Keys are
separated by spaces, and reported only if they are on.
"""

NAMES_OF_RUNS = "set this in the tracker's own environment variables"
ATTENTION = "lorafold chooses the attention implementation"
NUMBERS = "lorafold chooses kernels and dtypes itself"
MODEL = "lorafold uses the model and its tokenizer unchanged"
PROCESSES = "start the processes with torchrun or accelerate; batch is the total over all of them"
ROWS = "lorafold reads, tokenizes and orders rows in its own way"
DECAY = "lorafold's schedules decay to zero, and AdamW has only the arguments in the recipe"
ABSENT = "lorafold does not support this option and trains without it"
MEMORY = "affects memory or speed, not the result of training"
LOGGING = "lorafold logs the loss by itself and keeps the best checkpoint"
SYSTEM = "add this text to the rows as a column system, or to their messages with the role system"
HUB = "upload the saved adapter with the Hugging Face CLI (hf upload)"
MERGES = "use lorafold merge to merge the adapter into its base"
NEW_TOKENS = "add new tokens with --new-tokens"
BEST_FIT = "lorafold uses best-fit packing, and packed rows do not attend to each other"
EVERY_LAYER = "choose the modules with --targets: any linear layer of the language model's blocks"
OTHER_STAGE = "applies only to a stage or method that the file does not use"
REFERENCE = "lorafold loads one model and caches the reference's log-probabilities between runs"

# transformers' Trainer, for TRL, axolotl and LLaMA-Factory; below, for TRL and LLaMA-Factory
TRAINER = {
    "trackio_space_id": NAMES_OF_RUNS,
    "tf32 fp8 torch_compile torch_compile_backend torch_compile_mode": NUMBERS,
    "deepspeed fsdp fsdp_config ddp_timeout ddp_find_unused_parameters local_rank": PROCESSES,
    "streaming remove_unused_columns dataloader_drop_last dataloader_num_workers"
    " dataloader_pin_memory dataloader_prefetch_factor": ROWS,
    "lr_scheduler_kwargs optim_args": DECAY,
    "neftune_noise_alpha label_smoothing_factor": ABSENT,
    "gradient_checkpointing_kwargs torch_empty_cache_steps auto_find_batch_size": MEMORY,
    "logging_steps save_only_model load_best_model_at_end metric_for_best_model"
    " greater_is_better": LOGGING,
    "hub_model_id hub_strategy": HUB,
}
TRANSFORMERS = {
    "run_name project": NAMES_OF_RUNS,
    "use_liger_kernel bf16_full_eval": NUMBERS,
    "ddp_backend": PROCESSES,
    "dataloader_persistent_workers train_sampling_strategy data_seed ignore_data_skip": ROWS,
    "logging_dir logging_strategy logging_first_step log_level disable_tqdm"
    " include_num_input_tokens_seen per_device_eval_batch_size eval_delay eval_on_start": LOGGING,
    "push_to_hub hub_token hub_private_repo": HUB,
}
# TRL's own arguments
TRL = {
    "trackio_bucket_id trackio_static_space_id wandb_entity"
    " wandb_project wandb_run_group": NAMES_OF_RUNS,
    "attn_implementation": ATTENTION,
    "liger_kernel_config fp16_full_eval bnb_4bit_quant_storage label_names"
    " prediction_loss_only batch_eval_metrics include_for_metrics": NUMBERS,
    "precompute_ref_log_probs precompute_ref_batch_size": REFERENCE,
    "eos_token pad_token padding_value": "lorafold uses the tokenizer's own special tokens",
    "is_encoder_decoder model_init_kwargs router_aux_loss_coef"
    " ignore_bias_buffers use_cache": MODEL,
    "ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph accelerator_config"
    " parallelism_config average_tokens_across_devices log_on_each_node save_on_each_node"
    " eval_use_gather_object": PROCESSES,
    "dataset_num_proc dataset_kwargs dataset_streaming shuffle_dataset dataloader_in_order"
    " dataloader_multiprocessing_context length_column_name full_determinism": ROWS,
    "optim_target_modules": DECAY,
    "lora_exclude_modules": ABSENT,
    "activation_checkpointing activation_checkpointing_kwargs activation_offloading"
    " padding_free skip_memory_metrics eval_accumulation_steps eval_do_concat_batches": MEMORY,
    "log_level_replica logging_nan_inf_filter enable_jit_checkpoint debug"
    " restore_callback_states_from_checkpoint do_eval do_predict generate_during_eval": LOGGING,
    "hub_always_push hub_revision": HUB,
}
AXOLOTL = {
    "rl_adapter_ref_model precompute_ref_log_probs": REFERENCE,
    "wandb_watch": "lorafold does not log gradients",
    "added_tokens_overrides": NEW_TOKENS,
    "merge_lora": MERGES,
    "wandb_entity wandb_name wandb_run_id wandb_mode wandb_log_model mlflow_tracking_uri"
    " mlflow_experiment_name mlflow_run_name hf_mlflow_log_artifacts comet_workspace"
    " comet_project_name comet_mode trackio_project_name trackio_run_name swanlab_project"
    " swanlab_experiment_name swanlab_description swanlab_mode": NAMES_OF_RUNS,
    "flash_attention xformers_attention sdp_attention flex_attention sage_attention"
    " eager_attention attn_implementation flash_attn_cross_entropy flash_attn_fuse_mlp"
    " flash_attn_rms_norm s2_attention sdpa_varlen flash_optimum fused_attn_kernel"
    " flex_attn_compile_kwargs gemma4_hybrid_attn_impl": ATTENTION,
    "lora_mlp_kernel lora_qkv_kernel lora_o_kernel lora_embedding_kernel chunked_cross_entropy"
    " use_kernels liger_rope liger_rms_norm liger_glu_activation"
    " liger_fused_linear_cross_entropy liger_layer_norm liger_cross_entropy cut_cross_entropy"
    " bnb_config_kwargs tiled_mlp liger_rms_norm_gated experts_implementation"
    " quantize_moe_experts use_scattermoe use_sonicmoe fp8_enable_fsdp_float8_all_gather"
    " dpo_use_liger_kernel": NUMBERS,
    "model_type type_of_model tokenizer_type tokenizer_config base_model_config processor_type"
    " tokenizer_use_fast tokenizer_legacy is_llama_derived_model is_mistral_derived_model"
    " is_falcon_derived_model is_qwen_derived_model model_config overrides_of_model_config"
    " model_kwargs overrides_of_model_kwargs resize_token_embeddings_to_32x rope_scaling gptq"
    " gptq_groupsize gptq_model_v1 gptq_disable_exllama model_quantization_config"
    " model_quantization_config_kwargs tokenizer_use_mistral_common cls_model_config"
    " llama4_linearized_experts freeze_mm_modules experimental_skip_move_to_device": MODEL,
    "fsdp_version ddp ddp_bucket_cap_mb ddp_broadcast_buffers device_map max_memory world_size"
    " context_parallel_size sequence_parallel_degree tensor_parallel_size dp_shard_size"
    " dp_replicate_size expert_parallel_size use_ray ray_num_workers accelerator_config": PROCESSES,
    "dataset_prepared_path dataset_processes dataset_num_proc dataset_exact_deduplication"
    " dataset_keep_in_memory shuffle_merged_datasets skip_prepare_dataset group_by_length"
    " curriculum_sampling min_sample_len eot_tokens": ROWS,
    "eval_sample_packing pad_to_sequence_len pad_to_multiple_of sample_packing_group_size"
    " sample_packing_bin_size sample_packing_sequentially batch_flattening multipack_real_batches"
    " sample_packing_eff_est eval_sequence_len max_packed_sequence_len dpo_padding_free": BEST_FIT,
    "cosine_min_lr_ratio cosine_constant_lr_ratio lr_quadratic_warmup lr_groups embedding_lr"
    " embedding_lr_scale loraplus_lr_embedding optim_target_modules torchdistx_path": DECAY,
    "noisy_embedding_alpha peft_layers_to_transform peft_layers_pattern peft_layer_replication"
    " peft_trainable_token_indices use_eaft eaft_alpha eaft_k lisa_layers_attribute"
    " lisa_n_layers lisa_step_interval lora_exclude_modules trainer_cls"
    " loss_watchdog_threshold loss_watchdog_patience": ABSENT,
    "activation_offloading layer_offloading low_cpu_mem_usage lora_on_cpu gc_steps"
    " gpu_memory_limit selective_checkpointing embeddings_skip_upcast"
    " peft_autocast_adapter_dtype": MEMORY,
    "eval_batch_size strict debug early_stopping_patience save_first_step save_safetensors"
    " eval_table_size eval_max_new_tokens do_causal_lm_eval do_bench_eval"
    " include_tokens_per_second include_tkps": LOGGING,
    "hub_revision hf_use_auth_token push_dataset_to_hub": HUB,
}
LLAMAFACTORY = {
    "freeze_vision_tower freeze_multi_modal_projector freeze_language_model": EVERY_LAYER,
    "add_tokens add_special_tokens resize_vocab"
    " new_special_tokens_config init_special_tokens": NEW_TOKENS,
    "export_dir export_size export_device export_quantization_bit export_quantization_dataset"
    " export_legacy_format export_hub_model_id": MERGES,
    "do_eval do_predict predict_with_generate infer_backend infer_dtype temperature top_p"
    " top_k num_beams max_new_tokens repetition_penalty length_penalty do_sample eval_num_beams"
    " compute_accuracy vllm_maxlen vllm_gpu_util vllm_enforce_eager use_kv_cache"
    " generation_max_length": "use lorafold lab generate or lorafold eval",
    "swanlab_project swanlab_workspace swanlab_run_name"
    " swanlab_mode swanlab_api_key": NAMES_OF_RUNS,
    "flash_attn shift_attn": ATTENTION,
    "fp8_backend enable_liger_kernel use_unsloth upcast_layernorm upcast_lmhead_output"
    " use_v1_kernels": NUMBERS,
    "rope_scaling use_fast_tokenizer split_special_tokens cache_dir hf_hub_token ms_hub_token"
    " om_hub_token moe_aux_loss_coef model_max_length image_max_pixels image_min_pixels"
    " video_max_pixels video_min_pixels video_fps video_maxlen": MODEL,
    "ray_run_name ray_storage_path ray_num_workers ray_init_kwargs resources_per_worker"
    " placement_strategy use_ray device_map quantization_device_map": PROCESSES,
    "max_samples": "pass only that many rows as --data",
    "mix_strategy interleave_probs": "pass a share of each file: --data rows.jsonl:0.5",
    "media_dir overwrite_cache preprocessing_num_workers preprocessing_batch_size buffer_size"
    " tokenized_path data_shared_file_system group_by_length disable_shuffling tool_format"
    " preserve_thinking eval_on_each_dataset": ROWS,
    "loraplus_lr_embedding": DECAY,
    "use_dft_loss use_asft_loss asft_alpha use_eaft_loss eaft_alpha mixture_of_depths"
    " use_llama_pro use_adam_mini use_muon": ABSENT,
    "low_cpu_mem_usage use_unsloth_gc use_reentrant_gc offload_folder": MEMORY,
    "plot_loss include_tokens_per_second include_effective_tokens_per_second"
    " early_stopping_steps print_param_status eval_accumulation_steps full_determinism": LOGGING,
    "reward_model reward_model_type reward_model_adapters reward_model_quantization_bit"
    " ppo_epochs ppo_buffer_size ppo_score_norm ppo_target ppo_whiten_rewards"
    " freeze_trainable_layers freeze_trainable_modules freeze_extra_modules oft_rank"
    " oft_block_size oft_target module_dropout galore_rank galore_target galore_update_interval"
    " galore_scale galore_proj_type galore_layerwise apollo_rank apollo_target"
    " apollo_update_interval apollo_scale badam_mode badam_switch_mode badam_switch_interval"
    " badam_update_ratio": OTHER_STAGE,
}
