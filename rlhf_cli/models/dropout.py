"""Dropout: off in all that is loaded, on in the residual stream where sft asks for it."""

from typing import Any

from torch import nn

from rlhf_cli.config.errors import UserError


def disable_dropout(model: nn.Module) -> None:
    """No dropout in any mode: only sft has some, by `residual_dropout`."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def residual_dropout(model: nn.Module, p: float) -> None:
    """Drop what each attention and MLP block adds to the residual stream, in training mode."""

    def drop(module: nn.Module, inputs: Any, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        dropped = nn.functional.dropout(first, p, module.training)
        return (dropped, *output[1:]) if isinstance(output, tuple) else dropped

    blocks = [
        module
        for name, module in model.named_modules()
        if name.rsplit(".", 1)[-1] in ("self_attn", "attn", "attention", "mlp")
    ]
    if not blocks:
        raise UserError(f"{type(model).__name__}: no blocks found for model.dropout; set it to 0")
    for block in blocks:
        block.register_forward_hook(drop)
