"""Training options in the words of the transformers Trainer."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import TrainingArguments

from mmtune.checkpoints import TrainingError
from mmtune.device import device_of, require_optimizer

if TYPE_CHECKING:
    from mmtune.config import TrainingOptions

SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}
OPTIMIZERS = {"adamw": "adamw_torch", "paged_adamw": "paged_adamw_32bit"}


def trainer_arguments(options: TrainingOptions, output: Path, seed: int) -> TrainingArguments:
    """Our options in the Trainer's words."""
    device = device_of(options)
    require_optimizer(options)
    if options.report_to != "none" and find_spec(options.report_to) is None:
        raise TrainingError(
            f"training.report_to is {options.report_to}, which is not installed. "
            f"Run `pip install {options.report_to}`, or set training.report_to: none."
        )
    if options.keep == "best" and not options.save_every:
        raise TrainingError("training.keep: best needs checkpoints; set training.save_every > 0.")
    arguments = TrainingArguments(
        output_dir=str(output),
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.accumulation,
        num_train_epochs=options.epochs,
        learning_rate=options.lr,
        weight_decay=options.weight_decay,
        warmup_steps=options.warmup,
        lr_scheduler_type=SCHEDULES[options.schedule],
        max_grad_norm=options.max_grad_norm,
        optim=OPTIMIZERS[options.optimizer],
        bf16=options.precision == "bf16",
        use_cpu=device.type == "cpu",
        eval_strategy=options.evaluate if options.evaluate == "epoch" else "no",
        metric_for_best_model="primary" if options.evaluate == "epoch" else None,
        greater_is_better=True,
        save_strategy="steps" if options.save_every else "no",
        save_steps=options.save_every or 500,
        logging_steps=options.log_every,
        logging_nan_inf_filter=False,
        report_to=options.report_to,
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=[],
        seed=seed,
    )
    # Several GPUs are used through torchrun; DataParallel would split batches behind the task.
    _ = arguments.device
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments
