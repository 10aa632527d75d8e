"""Keys and values of TRL, axolotl and LLaMA-Factory, and what they are called in a recipe."""

from typing import Any

_NAMES = {
    "gradient_accumulation_steps per_device_train_batch_size micro_batch_size auto_find_batch_size": (
        "train.batch_size is the pairs of a whole step, over all processes, and train.tokens_per_micro_batch is what "
        "is computed at once"
    ),
    "per_device_eval_batch_size eval_batch_size": "responses are scored in batches of train.tokens_per_micro_batch",
    "num_train_epochs num_epochs": "train.epochs",
    "max_steps": "train.epochs; steps follow from the number of pairs",
    "lr": "train.learning_rate",
    "lr_scheduler_type scheduler": "train.lr_scheduler",
    "warmup_steps": "train.warmup_ratio, a share of the steps",
    "optim": "train.optimizer",
    "clip_grad gradient_clipping max_gradient_norm": "train.max_grad_norm",
    "max_seq_length max_seq_len sequence_len cutoff_len model_max_length max_prompt_length": "train.max_length",
    "max_completion_length max_response_length": "opponent.max_new_tokens",
    "lora_r lora_rank": "lora.r",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "lora_target lora_target_modules lora_target_linear": "lora.target_modules",
    "use_peft use_lora peft peft_config finetuning_type adapter": (
        "a section lora trains an adapter; without it all weights are trained"
    ),
    "load_in_8bit": "model.load_in_4bit; 8 bits are not supported",
    "quantization quantization_bit bnb_config bnb_4bit_quant_type": "model.load_in_4bit",
    "bf16 fp16 pure_bf16 tf32 torch_dtype mixed_precision": "model.dtype",
    "deepspeed zero_stage fsdp_config": "train.fsdp",
    "flash_attention flash_attn use_flash_attention_2 attn_implementation xformers_attention": (
        "spinlm chooses the attention; train.prefix_sharing says whether responses share their prompt"
    ),
    "packing sample_packing neat_packing": "rows are always packed; train.prefix_sharing is the related setting",
    "neftune_noise_alpha neftune": "not supported: noise on embeddings would make player and opponent differ",
    "save_strategy save_total_limit": "train.save_steps; the newest checkpoint is kept",
    "logging_steps eval_steps eval_strategy evaluation_strategy do_eval": (
        "every step is logged, and every player is evaluated on data.heldout prompts"
    ),
    "output_dir resume_from_checkpoint overwrite_output_dir run_name": (
        "the run folder is --run-dir; the same command continues a run, and --overwrite starts it again"
    ),
    "wandb_project use_wandb wandb logging": "report_to",
    "model_name_or_path model_name base_model pretrained_model_name_or_path model_id": "model.path",
    "adapter_name_or_path": "model.path",
    "dataset datasets dataset_name dataset_path dataset_dir train_file data_files dataset_id": "data.path",
    "dataset_config dataset_config_name": "data.subset",
    "max_samples max_train_samples num_samples": "data.prompts",
    "val_set_size eval_dataset test_size val_size eval_split": "data.heldout",
    "template": "data.chat_template",
    "enable_thinking thinking template_kwargs": "data.chat_template_kwargs",
    "system_prompt default_system": "data.columns.system, a column with system prompts",
    "train_on_inputs completion_only_loss assistant_only_loss train_on_prompt mask_prompt": (
        "the loss is always that of responses alone"
    ),
    "num_iterations num_iters rounds": "selfplay.iterations",
    "ref_model reference_model ref_model_path reference_free precompute_ref_log_probs sync_ref_model": (
        "the reference is the opponent, the player before the iteration; objective.reference_mix: 0 keeps the start"
    ),
    "loss_type loss pref_loss rl": "objective.name and objective.link",
    "dpo_beta pref_beta": "objective.beta",
    "rpo_alpha pref_ftx": "objective.nll_weight",
    "num_generations num_return_sequences": "opponent.samples_per_prompt",
    "use_vllm vllm_mode": "opponent.engine: vllm",
    "training training_args trainer training_arguments": "train",
}
KEYS = {name: answer for names, answer in _NAMES.items() for name in names.split()}

_DPO = "DPO is the objective spin on preference data: name the worse response in data.columns.rejected"
VALUES: dict[str, dict[str, str]] = {
    "objective.name": {
        **dict.fromkeys(("dpo", "ipo", "kto", "orpo", "simpo", "cpo", "rpo"), _DPO),
        **dict.fromkeys(("grpo", "ppo", "rloo", "reinforce"), "spinlm has no reward model; see data.columns.rejected"),
    },
    "opponent.engine": dict.fromkeys(("transformers", "hf", "huggingface"), "local, which is in this process"),
    "data.turns": dict.fromkeys(("every", "each"), "all"),
    "train.fsdp": {
        **dict.fromkeys(("full", "zero3", "zero-3", "true"), "full_shard"),
        **dict.fromkeys(("gradients", "zero2", "zero-2"), "shard_grad_op"),
    },
    "model.dtype": {
        **dict.fromkeys(("bf16", "half"), "bfloat16"),
        **dict.fromkeys(("fp32", "float"), "float32"),
        **dict.fromkeys(("fp16", "float16"), "bfloat16 or float32; float16 overflows in training"),
    },
    "train.lr_scheduler": dict.fromkeys(("cosine_with_restarts", "cosine_with_min_lr"), "cosine"),
}


def translate_key(key: str) -> str | None:
    """Return what a key of another trainer is called in a recipe, or a sentence about it; None if it is unknown."""
    return KEYS.get(key)


def translate_value(field: str, value: Any) -> str | None:
    """Return what a value of another trainer is called in a recipe; None if it is unknown."""
    return VALUES.get(field, {}).get(str(value).lower())
