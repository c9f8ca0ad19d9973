"""A scalar head on the decoder of a family of models for which transformers has no classifier.

This file stands by itself. transformers copies it into the folder of such a model, where

    AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)

loads it (AutoModelForTokenClassification, if every token has a score). An adapter's folder has it,
too: peft.PeftModel.from_pretrained(ScalarHeadForSequenceClassification.from_pretrained(base), it).
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    PreTrainedModel,
)
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.modeling_outputs import SequenceClassifierOutput, TokenClassifierOutput


class ScalarHead:
    """A decoder, under the name that its family gives it, and `score`, a layer on its last states.

    `score_bias` of a config says whether that has a bias; else it is as in transformers.
    """

    bias: bool  # where the config says nothing

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        self.config: Any
        self.base_model_prefix: str
        width = config.get_text_config().hidden_size
        setattr(self, self.base_model_prefix, AutoModel.from_config(config))
        bias = getattr(config, "score_bias", self.bias)
        self.score = nn.Linear(width, config.num_labels, bias=bias)
        self.post_init()  # type: ignore[attr-defined]

    @classmethod
    def from_pretrained(cls, path: str, *args: Any, config: Any = None, **settings: Any) -> Any:
        """A folder of such a model; of a language model, whose decoder gets a fresh head."""
        if config is None:
            labels = settings.pop("num_labels", 1)
            trust = settings.get("trust_remote_code")
            config = AutoConfig.from_pretrained(path, num_labels=labels, trust_remote_code=trust)
        rename_as_language_model(cls, type(config))
        family: Any = super(ScalarHead, in_family(cls, type(config)))
        return family.from_pretrained(path, *args, config=config, **settings)

    @classmethod
    def _from_config(cls, config: Any, **settings: Any) -> Any:
        family: Any = super(ScalarHead, in_family(cls, type(config)))
        return family._from_config(config, **settings)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """What AutoModel asks of classes in folders; each here knows its own."""

    @classmethod
    def is_custom_code(cls) -> bool:
        """No: weights are read and initialised as those of its decoder, which is the library's."""
        return False

    def states(self, **inputs: Any) -> Tensor:
        """The last hidden states: (B, T, d)."""
        decoder = getattr(self, self.base_model_prefix)
        given = {name: value for name, value in inputs.items() if value is not None}
        # where AutoModel has nothing smaller than the language model, it gives logits first
        whole = decoder.get_output_embeddings() is not None
        output = decoder(**{"use_cache": False, "output_hidden_states": whole, **given})
        states: Tensor = output.hidden_states[-1] if whole else output[0]
        return states


class ScalarHeadForSequenceClassification(ScalarHead):
    """A score of each sequence, read at its last token that is no padding: logits (B, 1)."""

    _auto_class = "AutoModelForSequenceClassification"
    bias = False

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **inputs: Any,
    ) -> SequenceClassifierOutput:
        """As the classifiers of transformers."""
        logits = self.score(
            self.states(
                input_ids=input_ids,
                attention_mask=attention_mask,
                inputs_embeds=inputs_embeds,
                **inputs,
            )
        )
        pad = self.config.get_text_config().pad_token_id
        if pad is None and len(logits) > 1:
            raise ValueError("cannot tell padding from text: config.pad_token_id is not set")
        last = torch.full((len(logits),), -1, device=logits.device)
        if pad is not None and input_ids is not None:
            places = torch.arange(input_ids.shape[1], device=logits.device)
            last = (places * (input_ids != pad)).argmax(-1)
        pooled = logits[torch.arange(len(logits), device=logits.device), last]
        loss = None
        if labels is not None:
            loss = self.loss_function(  # type: ignore[attr-defined]
                logits=logits, labels=labels, pooled_logits=pooled, config=self.config
            )
        return SequenceClassifierOutput(loss=loss, logits=pooled)


class ScalarHeadForTokenClassification(ScalarHead):
    """A score at each token: logits (B, T, 1)."""

    _auto_class = "AutoModelForTokenClassification"
    bias = True

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **inputs: Any,
    ) -> TokenClassifierOutput:
        """As the classifiers of transformers."""
        logits = self.score(
            self.states(
                input_ids=input_ids,
                attention_mask=attention_mask,
                inputs_embeds=inputs_embeds,
                **inputs,
            )
        )
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config)  # type: ignore[attr-defined]
        return TokenClassifierOutput(loss=loss, logits=logits)


def in_family(kind: type, config: type) -> Any:
    """The classifier of this kind for the models of a config, as one class of their family.

    Raises:
        ValueError: transformers does not know the decoder of that config.
    """
    if issubclass(kind, PreTrainedModel):
        return kind  # it is one already
    if config not in MODEL_MAPPING:
        raise ValueError(f"no decoder to put a scalar head on is known for a {config.__name__}")
    decoder: Any = MODEL_MAPPING[config]
    family = next(each for each in decoder.__mro__ if PreTrainedModel in each.__bases__)
    here = {"__module__": kind.__module__, "base_model_prefix": decoder.base_model_prefix}
    return type(kind.__name__, (kind, family), here)


def rename_as_language_model(kind: type, config: type) -> None:
    """Read and write weights under the names that the language model of a config has on disk.

    Where those are not the names of modules, transformers translates them by class (Qwen2.5-VL) or
    by family, and knows no class of ours. A class is of one family at a time, so this is said anew
    before each is read; what was read keeps its own.
    """
    autos: Any = (AutoModelForCausalLM, AutoModelForMultimodalLM)
    models = [auto._model_mapping.get(config, None) for auto in autos]
    names = [get_checkpoint_conversion_mapping(each.__name__) for each in models if each]
    known: Any = next((each for each in names if each is not None), None)  # None: by its family
    register_checkpoint_conversion_mapping(kind.__name__, known, overwrite=True)
