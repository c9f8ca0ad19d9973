"""Rules between the keys of `model`: weights from scratch, adapters, attention."""

from collections.abc import Iterator

from rlhf_cli.config.schema.models import Model, SftModel
from rlhf_cli.config.schema.stages import Run


def model_rules(cfg: Run) -> Iterator[str]:
    """What is wrong with the model of a run."""
    yield from _scratch(cfg)
    yield from _lora(cfg)
    yield from _attention(cfg)


def _scratch(cfg: Run) -> Iterator[str]:
    model = cfg.model
    if not isinstance(model, SftModel) or model.path is not None:
        return
    assert model.hidden_size and model.heads and model.context  # for the type checker
    if model.lora_rank or model.dtype != "float32":
        yield "a model from scratch trains all weights in float32: model.lora_rank=0 is needed"
    if model.frozen_layers:
        yield "a model from scratch trains all layers: model.frozen_layers=0 is needed"
    if model.router_aux_coef:
        yield "a model from scratch has no routers: model.router_aux_coef=null is needed"
    if model.hidden_size % model.heads:
        yield f"model.heads={model.heads} must divide model.hidden_size={model.hidden_size}"
    longest = (cfg.data.max_prompt_tokens or 0) + (cfg.data.max_response_tokens or 0)
    if model.context < longest:
        yield (
            f"model.context={model.context} is shorter than data.max_prompt_tokens + "
            f"data.max_response_tokens = {longest}; set model.context={longest} or lower them"
        )


def _lora(cfg: Run) -> Iterator[str]:
    model = cfg.model
    if not isinstance(model, Model):
        return
    if model.lora_rank == 0 and not model.merge_lora:
        yield "model.merge_lora=false writes an adapter, but model.lora_rank=0 trains none"
    yield from _adapter(cfg, model)
    if model.lora_rank and model.frozen_layers:
        yield (
            f"model.frozen_layers={model.frozen_layers} is for training all weights; an adapter "
            "(model.lora_rank > 0) freezes the whole base: set model.frozen_layers=0"
        )


def _adapter(cfg: Run, model: Model) -> Iterator[str]:
    use, whole = model.adapter, [*model.modules_to_save, *(["DoRA"] if model.use_dora else [])]
    if use in ("continue", "stack") and not model.lora_rank:
        yield f"model.adapter={use} trains an adapter, but model.lora_rank=0; set it to 16"
    if use == "merge" and model.lora_rank and not model.merge_lora:
        yield (
            "model.adapter=merge with model.merge_lora=false would write an adapter whose base is "
            "on no disk: set model.merge_lora=true, or export the policy first and start from that"
        )
    if use == "stack" and whole:
        yield f"model.adapter=stack adds up plain LoRA matrices, without {whole[0]}"
    if use == "stack" and getattr(cfg, "reference", None) == "bootstrap":
        yield "model.adapter=stack does not go with reference=bootstrap; continue or merge it"
    if model.quantize is not None and model.merge_lora:
        yield (
            f"model.quantize={model.quantize} writes an adapter, whose base has few bits here: set "
            "model.merge_lora=false"
        )


def _attention(cfg: Run) -> Iterator[str]:
    attention: str = cfg.model.attention
    if attention.startswith("flash") and cfg.model.dtype == "float32":
        yield f"model.attention={attention} has no float32: set model.dtype=bfloat16"
