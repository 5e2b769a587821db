"""Finds flags of train.py that were given but change nothing: no setting is ignored without a word."""

import dataclasses

from forge_lib.config import TrainConfig, flag_name


def flags_without_effect(config: TrainConfig, has_held_out_data: bool, num_steps: int) -> list[str]:
    """Returns a line for the log for each flag that has no effect beside the others.

    Args:
        config: every flag.
        has_held_out_data: whether there is something to evaluate on.
        num_steps: of the run.
    """
    reasons = {}
    if config.lr_scheduler == "constant":
        reasons["warmup_steps"] = "--lr-scheduler constant has no warm-up; use constant_with_warmup"
    if config.lr_scheduler != "warmup_stable_decay":
        reasons["decay_steps"] = "only --lr-scheduler warmup_stable_decay has a final decay"
    if not config.lora_rank:
        reasons["lora_alpha"] = "there is no adapter without --lora-rank"
    if not config.sample_every:
        reasons["sample_prompt"] = "no sample is written without --sample-every"
    if not has_held_out_data:
        reasons["keep_best"] = "there is no held-out data; give --eval-fraction or --eval-dataset-path"
        if config.eval_every:
            reasons["eval_every"] = reasons["keep_best"]
    elif not config.eval_every:
        reasons["keep_best"] = "the model is never evaluated with --eval-every 0"
    lines = describe_unused(config, reasons)
    if config.warmup_steps >= num_steps and "warmup_steps" not in reasons:
        lines.append(f"--warmup-steps {config.warmup_steps}: the run ends after {num_steps} steps, before the peak")
    if config.keep_best and "keep_best" not in reasons and config.checkpoint_every % config.eval_every:
        lines.append(
            "--keep-best needs an evaluation at each save: make --checkpoint-every a multiple of --eval-every"
        )
    return lines


def describe_unused(config: TrainConfig, reasons: dict[str, str]) -> list[str]:
    """Returns a line for each field of `reasons` whose value is not the default: why it has no effect."""
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    given = [name for name in reasons if getattr(config, name) != defaults[name]]
    return [f"{flag_name(name)} has no effect: {reasons[name]}" for name in given]
