"""What all policies of an evaluation share: prompts, judges, references, and what is kept."""

import math
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlhf_cli.config.schema.stages import EvaluateConfig
from rlhf_cli.data.items import Answers, EncodedPrompt
from rlhf_cli.data.kinds import Preference, Prompt, Ranking
from rlhf_cli.data.order import derived_seed
from rlhf_cli.data.reading import KindError
from rlhf_cli.data.tokens import Encoder
from rlhf_cli.evaluation.choices import Question, questions_of
from rlhf_cli.evaluation.entrants import Entrant
from rlhf_cli.evaluation.few_shot import as_asked_alone
from rlhf_cli.evaluation.figures import Sampled, scorers_of
from rlhf_cli.evaluation.judging import Report, judge
from rlhf_cli.evaluation.kept import KeptSamples, SamplesOfPolicy
from rlhf_cli.evaluation.references import references_of, scored_references
from rlhf_cli.evaluation.responses_cache import ResponsesCache
from rlhf_cli.evaluation.text_health import Seen
from rlhf_cli.reporting.console import Bar
from rlhf_cli.rewards.models import ModelReward
from rlhf_cli.rewards.reward import Reward, Scores, load_reward
from rlhf_cli.rollout.rollouts import Rollout
from rlhf_cli.rollout.sampling import Sampling
from rlhf_cli.runs.policy import Policy
from rlhf_cli.runs.session import Session


@dataclass
class Bench:
    """Held-out prompts and those who judge responses to them.

    judges: reward, then gold, as far as the config names them, then all others.
    scorer: the first model among the terms of the reward, which held-out rows judge.
    texts: the reference of each prompt, where the data has one.
    references: those, judged.
    seen: the training rows, where copies of them are counted.
    questions: of choices=FILE.
    cache: responses of other evaluations.
    device: the kind of it that samples.
    """

    cfg: EvaluateConfig
    encoder: Encoder
    prompts: list[EncodedPrompt]
    judges: dict[str, Reward]
    scorer: ModelReward | None
    judgement: Report | None
    kept: KeptSamples
    texts: list[str | None]
    references: Sampled | None
    seen: Seen | None
    questions: list[Question]
    cache: ResponsesCache
    device: str

    @classmethod
    def of(
        cls, session: Session, encoder: Encoder, prompts: list[EncodedPrompt], notes: list[str]
    ) -> "Bench":
        """Load the judges, have them check the rows, and claim the folder.

        Args:
            encoder: of the policy that is judged, whose tokens all others read.
            notes: what there is to say of the rows.
        """
        cfg: EvaluateConfig = session.cfg  # type: ignore[assignment]
        questions = [] if cfg.choices is None else questions_of(cfg.choices)
        seen = Seen.of(session.rows) if cfg.algo.overlap else None
        judges = load_judges(cfg, encoder, session)
        for each in judges.values():
            each.check([row for row, _ in prompts], session.require)
        scorer = model_in(judges.get("reward"))
        judgement = None if scorer is None else judged(session, scorer, encoder)
        session.note([*notes, *encoder.report()])
        kept = KeptSamples(session)
        texts = references_of(prompts, session.rows)
        references = scored_references(texts, prompts, encoder, judges, kept)
        return cls(
            *(cfg, encoder, prompts, judges, scorer, judgement, kept, texts, references),
            *(seen, questions, ResponsesCache(cfg), session.device.type),
        )

    def answered(self, entrant: Entrant, policy: Policy, temperature: float, bar: Bar) -> Sampled:
        """What a policy responds at a temperature, and what each judge says of it.

        Its draws hang on its own name and the temperature: neither the policies beside it nor its
        place among them move a figure of it, and the responses of two policies are independent.
        """
        cfg, prompts = self.cfg, policy.encoder.prompts([row for row, _ in self.prompts])
        samples = responses_at(cfg, entrant, temperature)
        sampling = replace(Sampling.of(cfg.algo), temperature=temperature)
        asker, asked = policy, prompts
        if entrant.shots is not None:
            rows, end = entrant.shots.asked([row for row, _ in prompts], policy.encoder)
            asker = entrant.shots.asker(policy, cfg)
            asked = asker.encoder.prompts(rows)
            sampling = replace(sampling, stop=(*sampling.stop, *([end] if end else [])))
        at = () if temperature == cfg.algo.temperature else (temperature,)
        name = entrant.name if not at else f"{entrant.name} at temperature {temperature:g}"
        own = self.kept.of(name, asked, samples)
        file = self.cache.file(name, entrant.path, asked, sampling, samples, self.device)
        known = self.cache.read(file, asked, samples)
        bar.skip(len(asked if known is not None else own.done) * samples)
        rollouts = known or asker.engine.sample(
            asked,
            sampling,
            samples=samples,
            seed=derived_seed(cfg.seed, "evaluate", entrant.name, *at),
            advance=bar.advance,
            kept=own,
        )
        if known is None:
            self.cache.write(file, rollouts)
        if entrant.shots is not None:
            rollouts = as_asked_alone(rollouts, prompts, samples, policy.encoder)
        return self._judged(own, rollouts, samples, entrant.best_of if temperature else 1)

    def _judged(
        self, own: SamplesOfPolicy, rollouts: list[Rollout], samples: int, best_of: int
    ) -> Sampled:
        """What each judge says; of the best of several by the reward, which alone hears them all.

        Args:
            samples: responses to each prompt.
            best_of: how many in a row are one to choose from.
        """
        said: dict[str, Scores] = {}
        for name, each in self.judges.items():  # the reward first
            said[name] = own.scored(name, each, rollouts)
            if name == "reward" and best_of > 1:
                places = best_places(said[name].total.view(-1, best_of))
                rollouts, said[name] = [rollouts[i] for i in places], said[name].at(places)
        return Sampled(rollouts, said, samples // best_of)

    def given(self, name: str, rollouts: list[Rollout]) -> Sampled:
        """What each judge says of responses that a file has."""
        samples = len(rollouts) // len(self.prompts)
        own = self.kept.of(name, [], samples)
        said = {judge: own.scored(judge, each, rollouts) for judge, each in self.judges.items()}
        return Sampled(rollouts, said, samples)


def samples_at(cfg: EvaluateConfig, temperature: float) -> int:
    """Responses to a prompt: greedy ones beside sampled ones would all be the same."""
    greedy = temperature == 0 and temperature != cfg.algo.temperature
    return 1 if greedy else cfg.algo.samples


def responses_at(cfg: EvaluateConfig, entrant: Entrant, temperature: float) -> int:
    """How many are sampled to a prompt; greedy ones are all the same, so none is the best."""
    return samples_at(cfg, temperature) * (entrant.best_of if temperature else 1)


def best_places(scores: Tensor) -> list[int]:
    """Of each n in a row the place of the best among all; the first of equals, which are drawn
    alike, and one without a score only where none has one.

    Args: scores (G, n).
    """
    best = scores.nan_to_num(-math.inf, neginf=-math.inf).argmax(-1)  # (G,)
    return (torch.arange(len(scores)) * scores.shape[-1] + best).tolist()


def load_judges(cfg: EvaluateConfig, encoder: Encoder, session: Session) -> dict[str, Reward]:
    """Reward, then gold, as far as the config names them, then all others."""
    return {
        name: load_reward(spec, cfg, encoder.tokenizer, session.device)
        for name, spec in scorers_of(cfg).items()
    }


def model_in(reward: Reward | None) -> ModelReward | None:
    """The first model among the terms of a reward."""
    sources = [term.source for term in reward.terms] if reward is not None else []
    return next((source for source in sources if isinstance(source, ModelReward)), None)


def judged(session: Session, source: ModelReward, encoder: Encoder) -> Report | None:
    """How a reward model orders held-out pairs, or rankings; None without either."""
    for kind in (Preference, Ranking):
        with suppress(KindError):
            items = encoder.answers(session.rows.held_out(kind).held_out)
            written = [rollout for item in items for rollout in as_rollouts(item, encoder)]
            scores = source.raw_of(written).split([len(item.responses) for item in items])
            scored = [pair for pair in zip(items, scores, strict=True) if pair[1].isfinite().all()]
            if scored:
                return judge([item for item, _ in scored], [each for _, each in scored])
    return None


def as_rollouts(item: Answers, encoder: Encoder) -> list[Rollout]:
    """The responses of a row as if the policy had written them."""
    row = Prompt(item.row.prompt, item.row.columns, item.row.source)
    return [
        Rollout(
            row,
            sequence,
            [],
            "eos" if sequence.response[-1] in encoder.stop_ids else "length",
            encoder.text(sequence.response),
        )
        for sequence in item.sequences
    ]
