# SPDX-License-Identifier: Apache-2.0
"""Mistakes on the command line: added to a working command, each must be refused with the argument's name and value."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from tests.reliability.bad_input import BadInputCase, usual
from tests.reliability.inputs import SCRIPTS

GLUE, IMAGE, MLM, SWEEP = SCRIPTS

# By class and script: arguments to add, one mistake in each line. The message must contain the name and the value of
# the first argument. Words after "=>" must be in the message too; words after "=>>" must be in it instead.
MISTAKES: dict[str, dict[str, str]] = {
    "numbers out of range": {
        GLUE: """
            --learning_rate nan
            --learning_rate -1
            --learning_rate inf
            --weight_decay nan
            --weight_decay -0.1
            --num_train_epochs nan
            --num_train_epochs inf
            --num_train_epochs -1
            --max_steps -5
            --warmup_steps -1
            --warmup_steps nan
            --per_device_train_batch_size 0
            --per_device_train_batch_size -4
            --per_device_eval_batch_size 0
            --gradient_accumulation_steps 0
            --seed -1
            --seed 99999999999999999999
            --max_grad_norm nan
            --adam_beta1 1.5
            --adam_beta2 -0.1
            --adam_beta1 nan
            --adam_epsilon -0.001
            --label_smoothing_factor 2
            --label_smoothing_factor -1
            --label_smoothing_factor nan
            --logging_steps -1
            --logging_steps nan
            --save_steps 0
            --save_steps -3
            --eval_steps -3 --eval_strategy steps
            --eval_delay nan --eval_strategy steps --eval_steps 3
            --dataloader_num_workers -1
            --eval_accumulation_steps 0
            --max_train_samples 0
            --max_eval_samples -1
            --max_seq_length 0
            --max_seq_length 9999 => 64
            --flops_ratio nan
            --flops_ratio 0
            --flops_ratio -0.5
            --flops_ratio 1.5
            --flops_ratio inf
            --latency_ratio nan
            --max_changed nan
            --max_changed 0
            --max_changed 1.5
            --max_changed -0.01
            --flops_ratio 0.9 --calibration_samples 0 =>> --calibration_samples 0
            --flops_ratio 0.9 --calibration_samples -1 =>> --calibration_samples -1
            --r -1
            --r 1,-2,0,0
            --r_inflection nan --r 1
            --r_inflection 3 --r 1
            --min_latents 0
            --min_latents 99 => 8
        """,
        IMAGE: """
            --train_val_split nan
            --train_val_split 0
            --train_val_split 1
            --crop_scale nan
            --crop_scale 0
            --crop_scale 2
            --horizontal_flip nan
            --horizontal_flip -1
            --horizontal_flip 2
            --neftune_noise_alpha -1
            --learning_rate nan
            --max_predict_samples -1
        """,
        MLM: """
            --mlm_probability nan
            --mlm_probability 0
            --mlm_probability 1.5
            --mask_replace_prob nan
            --mask_replace_prob -0.1
            --mask_replace_prob 0.8 --random_replace_prob 0.9
            --random_replace_prob nan
            --validation_split_percentage 0
            --validation_split_percentage 100
            --max_seq_length 0
            --weight_decay inf
        """,
        SWEEP: """
            --r -2
            --r 1 --timing_rounds -1 =>> --timing_rounds -1
            --r 1 --timing_batch_size 0 =>> --timing_batch_size 0
            --r 1 --calibration_samples -4 =>> --calibration_samples -4
            --r 1 --min_latents 0 =>> min_latents 0
            --r 1 --r_inflection nan =>> r_inflection nan
            --flops_ratio nan
            --flops_ratio 0
            --flops_ratio 2
            --flops_ratio 0.01
            --latency_ratio nan
            --latency_ratio -1
            --max_changed nan
            --max_changed 2
            --r 1 --max_eval_samples 0 =>> --max_eval_samples 0
            --r 1 --per_device_eval_batch_size 0 =>> --per_device_eval_batch_size 0
        """,
    },
    "values of another type": {
        GLUE: """
            --learning_rate abc
            --learning_rate
            --max_steps 1.5
            --do_train maybe
            --seed one
            --seed 1.5
            --r 1.5
            --r x
            --r 1,,2
            --r ""
            --r 1,1 => 4
            --bf16 perhaps
            --lr_scheduler_kwargs {broken
            --lr_scheduler_kwargs [1,2]
            --optim_args nonsense
            --accelerator_config {broken
            --gradient_checkpointing_kwargs 5 --gradient_checkpointing
        """,
        IMAGE: """
            --crop_scale wide
            --config_overrides num_latents=many
            --config_overrides num_latents
            --config_overrides latents=3
            --config_overrides num_latents=0
            --config_overrides num_latents=-4
            --config_overrides image_size=0
        """,
        MLM: """
            --mlm_probability often
            --validation_split_percentage 5.5
        """,
        SWEEP: """
            --r one
            --r 1 --proportional_attention maybe =>> --proportional_attention maybe
            --r 1 --timing_rounds 1.5 =>> --timing_rounds 1.5
            --flops_ratio half
            --max_changed few
        """,
    },
    "names that are not there": {
        GLUE: """
            --task_name glue => sst2
            --not_an_argument 5 =>> not_an_argument
            --optim adam_of_the_future
            --lr_scheduler_type steep
            --report_to nobody
            --eval_strategy often
            --save_strategy often
            --logging_strategy often
            --schedule steep --flops_ratio 0.9
            --merge_method glue => bipartite
            --merge_metric query => key
            --tokenizer_name not/there
            --dataset_name not/there
            --config_name not_there.json
            --config_name not/there
            --train_sampling_strategy backwards
            --debug everything
            --log_level loud
            --hub_strategy sometimes
            --metric_for_best_model f1 --load_best_model_at_end --eval_strategy steps --eval_steps 3
            --dataloader_multiprocessing_context thread --dataloader_num_workers 1
            --torch_compile_backend quantum
            --include_for_metrics everything
        """,
        IMAGE: """
            --image_processor_name not/there
            --dataset_name not/there
            --dataset_config_name not_there =>> not_there
            --train_dir not_there
            --image_column_name picture
            --label_column_name kind
            --optim adam_of_the_future
        """,
        MLM: """
            --dataset_config_name one,three =>> three
            --train_file not_there.txt
            --validation_file not_there.csv
            --tokenizer_name not/there
        """,
        SWEEP: """
            --model_name_or_path not/there
            --r 1 --merge_method glue =>> merge_method glue
            --r 1 --merge_metric query =>> merge_metric query
            --flops_ratio 0.9 --schedule steep =>> --schedule steep
            --r 1 --retrain_epochs 1 --optim adam_of_the_future =>> optim adam_of_the_future
        """,
    },
    "packages and machines that are not there": {
        GLUE: """
            --optim adamw_apex_fused
            --optim adamw_bnb_8bit
            --optim adamw_torch_8bit
            --optim galore_adamw
            --optim lomo
            --optim schedule_free_adamw
            --report_to wandb
            --report_to tensorboard
            --report_to comet_ml
            --use_liger_kernel
            --deepspeed not_there.json
            --fsdp full_shard
            --tf32 true =>> tf32
            --torch_compile_mode fastest
        """,
        SWEEP: """
            --r 1 --retrain_epochs 1 --optim adamw_bnb_8bit =>> optim adamw_bnb_8bit
            --r 1 --retrain_epochs 1 --report_to wandb =>> report_to wandb
        """,
    },
    "arguments that exclude each other or lack another": {
        GLUE: """
            --flops_ratio 0.9 --r 1
            --latency_ratio 0.9 --flops_ratio 0.9 => --flops_ratio
            --max_changed 0.1 --flops_ratio 0.9 => --flops_ratio
            --max_changed 0.1 --r 1 => --r
            --calibration_samples 8 --r 1
            --calibration_samples 8 --flops_ratio 0.9 --schedule floor
            --schedule geometric
            --merge_method groups => --flops_ratio
            --merge_method groups --r 1
            --merge_method groups --flops_ratio 0.9 --schedule floor
            --merge_method groups --flops_ratio 0.9 => --model_name_or_path
            --load_best_model_at_end --save_strategy no --eval_strategy epoch
            --load_best_model_at_end
            --bf16 --fp16
            --metric_for_best_model accuracy --load_best_model_at_end =>> load_best_model_at_end
            --dataloader_prefetch_factor 2 =>> dataloader_prefetch_factor
            --max_steps 0
            --model_name_or_path not/there =>> --config_name
        """,
        IMAGE: """
            --do_predict --train_dir . --dataset_name not/there =>> not/there
            --elastic --do_train false
            --distillation_weight -1 --elastic
            --distillation_weight nan --elastic
            --save_strategy best
        """,
        MLM: """
            --do_predict
            --task_name sst2 =>> --task_name
        """,
        SWEEP: """
            --elastic
            --r 1 2 1
            --r 1 --merge_method bipartite bipartite =>> --merge_method bipartite
            --schedule geometric
            --merge_method groups => --flops_ratio
            --merge_method groups bipartite --r 1 --flops_ratio 0.9
            --merge_method groups --flops_ratio 0.9 --schedule search floor
            --flops_ratio 0.9 0.9
            --max_changed 0.9 0.9
            --calibration_samples 8 --r 1
            --task_name mrpc --r 1
            --schedule floor skip_blocks
            --config_name x.json --r 1
            --r 1,1
        """,
    },
    "retraining and sweeps": {
        GLUE: """
            --retrain_epochs 1 => --r
            --retrain_epochs nan --r 1
            --retrain_epochs inf --r 1
            --retrain_epochs -1 --r 1
            --retrain_learning_rate -1 --retrain_epochs 1 --r 1
            --retrain_learning_rate nan --retrain_epochs 1 --r 1
            --retrain_learning_rate inf --retrain_epochs 1 --r 1
            --retrain_epochs 1 --r 1 --do_train false
            --retrain_epochs 1 --flops_ratio 0.1 =>> --flops_ratio 0.1
        """,
        IMAGE: """
            --retrain_epochs 1 --r 9,9 =>> 9,9 4
            --retrain_learning_rate -3 --retrain_epochs 1 --r 1
        """,
        MLM: """
            --retrain_epochs nan --r 1
            --retrain_learning_rate nan --retrain_epochs 1 --r 1
        """,
        SWEEP: """
            --retrain_epochs -1 --r 1
            --retrain_epochs nan --r 1
            --retrain_learning_rate nan --retrain_epochs 1 --r 1
            --retrain_learning_rate -1 --retrain_epochs 1 --r 1
            --r 1 --retrain_epochs 1 --learning_rate nan =>> --learning_rate nan
            --r 1 --retrain_epochs 1 --per_device_train_batch_size 0 =>> --per_device_train_batch_size 0
            --distillation_weight inf --elastic --retrain_epochs 1
        """,
    },
    "the Hub": {
        GLUE: """
            --push_to_hub => token
            --push_to_hub --hub_strategy all_checkpoints =>> --hub_strategy all_checkpoints
            --push_to_hub --hub_strategy checkpoint =>> --hub_strategy checkpoint
            --push_to_hub --hub_token hf_notatoken =>> push_to_hub
            --push_to_hub --hub_token "hf_two words" =>> --hub_token
            --push_only =>> token
        """,
        SWEEP: "--push_to_hub --r 1 => token\n--push_only =>> token",
        IMAGE: "--push_to_hub --do_train false => --output_dir",
    },
}


def argument_mistakes() -> Iterator[BadInputCase]:
    """Yield a case for each line of `MISTAKES`."""
    for mistake, scripts in MISTAKES.items():
        for script, lines in scripts.items():
            for line in filter(None, map(str.strip, lines.splitlines())):
                added, _, says = line.partition("=>")
                words = shlex.split(added)
                named = [] if says.startswith(">") else _named(words)
                said = tuple(word.lstrip("-") for word in (*named, *says.removeprefix(">").split()))
                yield BadInputCase(mistake, added.strip(), script, usual(script, *words), said)


def _named(words: list[str]) -> list[str]:
    """Return the first argument and its first value; a message may write `r = 2` or `--r 2`."""
    value = [word for word in words[1:2] if not word.startswith("--")]
    return [words[0], *value]
