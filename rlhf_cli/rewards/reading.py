"""What reward models are given to read: ids of the policy, or texts in ids of their own."""

from collections.abc import Sequence
from dataclasses import replace

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from rlhf_cli.config.schema.data import Data
from rlhf_cli.data.items import Tokens
from rlhf_cli.data.kinds import Prompt
from rlhf_cli.data.tokens import Encoder
from rlhf_cli.folders.manifest import (
    adapter_base,
    read_manifest,
    trained_here,
)
from rlhf_cli.models.loading_faults import told
from rlhf_cli.reporting.console import say
from rlhf_cli.rollout.rollouts import Rollout


class Reader:
    """What a reward model is given to read: the policy's ids, or the text in ids of its own.

    The prompt is cut at its start to fit the model's context, as data.long_prompts=cut does. A
    response that does not fit has no sequence: a cut one would be another response.
    """

    def __init__(
        self,
        path: str,
        context: int | None,
        begin: list[int],
        encoder: Encoder | None,
        padding: int | None = None,
    ) -> None:
        """A reader of the policy's ids or of text.

        Args:
            begin: the ids with which the model's texts begin, kept where prompts are cut.
            encoder: of the model's own tokenizer and template; None where it is the policy's.
            padding: an id that ends responses and that it takes for padding, by `end_as_padding`.
        """
        self.path = path
        self.padding = padding
        self.context = context
        self.begin = begin
        self.encoder = encoder
        self._told: set[str] = set()

    @property
    def shares_vocabulary(self) -> bool:
        """Whether the policy's ids mean the same to this model."""
        return self.encoder is None

    def check(self, rows: Sequence[Prompt]) -> None:
        """The model's template can write prompts of every sort among these.

        Raises:
            UserError: there are dialogues, and no template that writes them.
        """
        if self.encoder is None:
            return
        prompts = [(row.prompt, row) for row in rows if not isinstance(row.prompt, str)]
        sorts = {tuple(turn["role"] for turn in turns): row for turns, row in prompts}
        dialogues = list(sorts.values())
        if dialogues:
            self.encoder.written(dialogues, ["a"] * len(dialogues), [True] * len(dialogues))

    def sequences(self, rollouts: Sequence[Rollout]) -> list[Tokens | None]:
        """Prompt and response of each rollout; None where the response does not fit."""
        if self.encoder is None:
            read = [rollout.tokens for rollout in rollouts]
        else:
            rows = [rollout.row for rollout in rollouts]
            texts = [rollout.text for rollout in rollouts]
            read = self.encoder.written(rows, texts, [rollout.ended for rollout in rollouts])
        read = [self._scored(sequence) for sequence in read]
        fitted = [self._fit(sequence) for sequence in read]
        cuts = sum(
            new is not None and new is not old for new, old in zip(fitted, read, strict=True)
        )
        self.tell("prompts are cut at their start to fit its context", cuts, len(read))
        self.tell("responses exceed its context and get no reward", fitted.count(None), len(read))
        return fitted

    def _scored(self, sequence: Tokens) -> Tokens:
        """A sequence up to the token at which the model gives its score."""
        if self.padding is None or sequence.response[-1:] != [self.padding]:
            return sequence
        ids = [*sequence.prompt, *sequence.response]
        while len(ids) > 2 and ids[-1] == self.padding:
            ids.pop()
        cut = min(len(sequence.prompt), len(ids) - 1)  # an empty response has no token to score
        return replace(sequence, prompt=ids[:cut], response=ids[cut:], loss=None)

    def _fit(self, sequence: Tokens) -> Tokens | None:
        excess = 0 if self.context is None else len(sequence) - self.context
        if excess <= 0:
            return sequence
        prompt = sequence.prompt
        kept = len(self.begin) if prompt[: len(self.begin)] == self.begin else 0
        if excess > len(prompt) - max(kept, 1):
            return None
        return replace(sequence, prompt=prompt[:kept] + prompt[kept + excess :])

    def tell(self, what: str, count: int, total: int, where: str = "") -> None:
        """Say once that and how often something first happened, and in which row."""
        if count and what not in self._told:
            self._told.add(what)
            row = f", such as {where}" if where else ""
            say(f"note: reward={self.path}: {what}{row} ({count} of the first {total}; told once)")

    def tell_failures(self, failed: Sequence[Tokens], total: int) -> None:
        """Say once that the model failed at responses: its scores of them are not finite."""
        where = failed[0].source if failed else ""
        self.tell("scores that are not finite are no reward", len(failed), total, where)


def end_as_padding(path: str, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The EOS id of a reward model that takes it for padding; None where it does not.

    So others train those whose tokenizer has no pad token (TRL, for one): the classifiers of
    transformers score the last token that is no padding, which is then the one before EOS. Ours
    are trained at the end of the response.
    """
    if trained_here(read_manifest(path)):
        return None
    pads = [tokenizer.pad_token_id]
    if adapter_base(path) is None:  # the base's own was another before it had a head
        with told(f"{path}: unreadable config"):
            said, _ = PretrainedConfig.get_config_dict(path)
        pads.append(said.get("pad_token_id"))
    eos: int | None = tokenizer.eos_token_id
    return eos if eos in pads else None


def own_data(path: str, data: Data) -> Data:
    """How a model with another tokenizer is written to: by its own template, without limits."""
    said = read_manifest(path) or {}
    return replace(
        data,
        template=said.get("template", data.template),
        chat_template=None,
        chat_args=said.get("chat_args", {}),
        max_prompt_tokens=None,
        max_response_tokens=None,
    )
