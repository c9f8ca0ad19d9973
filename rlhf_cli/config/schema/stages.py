"""Each stage: its groups and its own keys. config/stages.py has what else is known of it."""

from dataclasses import dataclass
from typing import Any, ClassVar

from rlhf_cli.config.schema.algorithms import (
    Algo,
    Decoding,
    DpoAlgo,
    EvaluateAlgo,
    GenerateAlgo,
    GrpoAlgo,
    LabelAlgo,
    OnlineAlgo,
    OptimizerConfig,
    PpoAlgo,
    RewardAlgo,
    SftAlgo,
)
from rlhf_cli.config.schema.data import Data
from rlhf_cli.config.schema.hardware import Hardware
from rlhf_cli.config.schema.judges import JudgeKeys
from rlhf_cli.config.schema.keys import key
from rlhf_cli.config.schema.models import FrozenModel, Model, SftModel

REVISES = "algo.revisions>0"


@dataclass
class Run:
    """What every stage has.

    trains: whether it changes weights, step by step.
    samples_online: whether it learns from responses that it samples itself.
    """

    trains: ClassVar[bool] = False
    samples_online: ClassVar[bool] = False

    name: str = key("Name of the chain; default paths lie under runs/NAME.")
    out: str = key("Folder that the stage writes.")
    seed: int = key("Fixes initialisation, data order and sampling.", ge=0)
    overwrite: bool = key("Start afresh in an out folder that another config made.")
    tracker: Any = key(
        "Where metrics go as well, one or a list: each needs the extra of its name, and takes keys "
        "and addresses from its own environment variables; null: nowhere.",
        choices=("tensorboard", "wandb", "mlflow", "trackio"),
        texts=True,
    )
    data: Data
    hardware: Hardware
    model: FrozenModel
    algo: Algo

    @property
    def start(self) -> str | None:
        """Folder or hub id of the model that the stage starts from; None builds one."""
        return getattr(self, "policy", None)

    @property
    def trackers(self) -> list[str]:
        """`tracker` as a list, each of them once."""
        given = [self.tracker] if isinstance(self.tracker, str) else self.tracker or []
        return list(dict.fromkeys(given))


@dataclass
class TrainingConfig(Run):
    """What every stage has that changes weights."""

    trains: ClassVar[bool] = True

    model: Model
    algo: OptimizerConfig


@dataclass
class OnlineConfig(TrainingConfig):
    """What every stage has that learns from responses that it samples itself."""

    samples_online: ClassVar[bool] = True

    policy: str = key("Policy folder or hub id to start from; also the reference.", role="policy")
    reward: str = key(
        "Sum of terms, as in DIR + 0.2*length:20: reward folders or hub ids, dpo outputs (implicit "
        "rewards), rules, and functions as file.py:name.",
        role="reward",
    )
    reward_timeout: float = key("Seconds that an async reward function has for one response.", gt=0)
    gold: str | None = key(
        "Held-out judge, a folder or rule that is never trained on; evaluations show it.",
        role="reward",
    )
    algo: OnlineAlgo


@dataclass
class SamplingConfig(Run):
    """What every stage has that samples responses and trains nothing."""

    policy: str = key("Policy folder or hub id to sample from.", role="policy")
    reward: str | None = key(
        "What scores the samples: models, rules and functions, as in ppo; null: nothing.",
        role="reward",
    )
    reward_timeout: float = key("Seconds that an async reward function has for one response.", gt=0)
    algo: Decoding


@dataclass
class SftConfig(TrainingConfig):
    """Supervised fine-tuning: demonstrations -> policy."""

    select_by: str = key(
        "How algo.keep=best chooses: lowest held-out loss, or highest mean reward of responses to "
        "held-out prompts (InstructGPT).",
        choices=("loss", "reward"),
    )
    reward: str | None = key(
        "What scores responses; models, rules and functions, as in ppo.",
        role="reward",
        used_by="select_by=reward",
        needed=True,
    )
    reward_timeout: float = key("Seconds that an async reward function has for one response.", gt=0)
    model: SftModel
    algo: SftAlgo

    @property
    def start(self) -> str | None:
        """Folder or hub id of the model that the stage starts from; None builds one."""
        return self.model.path


@dataclass
class RewardConfig(TrainingConfig):
    """Reward model: policy trunk and feedback -> classifier with one label."""

    policy: str = key(
        "Policy folder or hub id whose trunk is used; or a reward model, which goes on with its "
        "head.",
        role="policy",
    )
    algo: RewardAlgo


@dataclass
class PpoConfig(OnlineConfig):
    """PPO and its family: policy, reward and prompts -> policy."""

    algo: PpoAlgo


@dataclass
class DpoConfig(TrainingConfig):
    """Direct preference optimisation and its family: policy and feedback -> policy."""

    policy: str = key("Policy folder or hub id to start from.", role="policy")
    reference: str | None = key(
        "null: the policy as it starts; a folder or hub id; or bootstrap: SFT on the chosen side "
        "first, from which both policy and reference start.",
        role="policy",
    )
    reference_cache: str | None = key(
        "Folder that keeps precomputed log-probs of the reference; null keeps none."
    )
    algo: DpoAlgo


@dataclass
class GrpoConfig(OnlineConfig):
    """GRPO and its family: policy, reward or verifier, and prompts -> policy."""

    judge: str | None = key(
        "What labels the policy's responses for the reward model to learn from: models, rules and "
        "functions, as in reward, but never the one that learns.",
        role="reward",
        used_by="algo.refresh_reward",
        needed=True,
    )
    algo: GrpoAlgo


@dataclass
class GenerateConfig(SamplingConfig):
    """Sampling: policy and prompts -> samples.jsonl."""

    principles: str | None = key(
        "File of principles, one on each line, of which one is drawn for each revision.",
        used_by=REVISES,
        needed=True,
    )
    reviser: str | None = key(
        "Language model that criticises and revises: a policy folder or hub id, or the address of "
        "an endpoint with the chat route of OpenAI, whose key is REVISER_API_KEY or "
        "OPENAI_API_KEY of the environment; null is the policy itself, as in the paper.",
        role="policy",
        used_by=REVISES,
    )
    reviser_model: str | None = key("Name of the model at that endpoint.", used_by="reviser")
    reviser_concurrency: int = key(
        "Requests to that endpoint at once.", ge=1, used_by="reviser", unused=8
    )
    reviser_timeout: float = key(
        "Seconds for a request with all that it is tried again.",
        gt=0,
        used_by="reviser",
        unused=120.0,
    )
    critique_prompt: str | None = key(
        "File that asks for a critique, with {prompt}, {response} and {principle}; null is ours.",
        used_by=REVISES,
    )
    revision_prompt: str | None = key(
        "File that asks for a revision, with {prompt}, {response} and {critique}, and {principle} "
        "if you like; null is ours.",
        used_by=REVISES,
    )
    algo: GenerateAlgo


@dataclass
class LabelConfig(JudgeKeys, SamplingConfig):
    """Labelling: responses and who judges them -> rankings, preferences or feedback."""

    policy: str | None = key(  # type: ignore[assignment]  # other stages cannot do without
        "Policy folder or hub id to sample from; null where samples=FILE has all that is needed.",
        role="policy",
    )
    baselines: list[str] = key(
        "Policies that are sampled from as well: who wrote what is hidden from who labels.",
        role="policy",
    )
    samples: str | None = key(
        "File of responses to label in place of sampling: rows of prompt, response and, if known, "
        "policy and reward, as samples.jsonl has them."
    )
    asked: list[str] = key(
        "Files of rows whose prompts are not asked again, as tasks.jsonl of the rounds before.",
    )
    reward: str | None = key(
        "What scores responses, as in ppo: source=reward labels by it, and with other sources the "
        "report tells how far they agree with it.",
        role="reward",
    )
    scorers: list[str] = key(
        "Further reward models, rules and functions by which algo.select chooses, beside `reward`; "
        "where that is what labels, by these alone.",
        role="reward",
        used_by="algo.select=gap|fisher|disagree",
        unused=[],
    )
    source: str = key(
        "Who labels: people on a local web page or in this terminal; the reward, or what "
        "samples=FILE says of it; the judge, which with other sources is compared with what they "
        "say; or labels=FILE.",
        choices=("page", "terminal", "reward", "judge", "file"),
    )
    annotators: list[str] = key("Names of those who label; tasks are dealt out to them.")
    who: str | None = key(
        "Which of them sits at the terminal; null is the first.", used_by="source=terminal"
    )
    port: int = key(
        "Port of the page on this machine, with source=page and review=true; 0 takes a free one.",
        ge=0,
        le=65535,
    )
    labels: str | None = key(
        "File of labels that were made elsewhere, of the tasks in tasks.jsonl: rows of task, "
        "annotator and ranks, strength, label, ratings, marks, first_wrong, skip or flag.",
        used_by="source=file",
        needed=True,
    )
    flip: float = key(
        "Chance that the reward's label of a task is turned round, of each annotator by itself: a "
        "crowd that errs.",
        ge=0,
        le=0.5,
        used_by="source=reward",
        unused=0.0,
    )
    instructions: str | None = key(
        "Text file with what annotators are to judge by; its hash is in every row."
    )
    known: str | None = key(
        "Rows whose answer is known (rankings, preferences, feedback, stepwise): tasks that are "
        "mixed into everybody's and enter no row; the report tells how often who is right.",
        used_by="source=page|terminal|file|judge",
    )
    anchors: str | None = key(
        "Folder of an earlier label run, of whose tasks some come again to everybody and enter no "
        "row: the report sets what people say of them beside what they said then.",
        used_by="source=page|terminal|file|judge",
    )
    review: bool = key(
        "Show on a page, to you alone, where annotators disagree with each other or with the "
        "reward, or a judge with itself in the other order, with the names of all; an answer that "
        "you give there takes the place of theirs."
    )
    accept_partial: bool = key(
        "Seal what is labelled where tasks are left, or the judge beside people cannot be asked."
    )
    algo: LabelAlgo


@dataclass
class EvaluateConfig(JudgeKeys, SamplingConfig):
    """Evaluation: policy, baselines, reward -> report.json."""

    baselines: list[str] | None = key(
        "Policies to compare with, or patterns of them as runs/sweep/*/ppo; null takes the "
        "finished policies beside `policy`.",
        role="policy",
    )
    reference: str | None = key("Policy that KL is measured to; null measures none.", role="policy")
    gold: str | None = key(
        "Scorer that training never saw; null reports the reward only.", role="reward"
    )
    scorers: list[str] = key(
        "Further reward models, rules and functions that score all responses, each told by itself; "
        "a list, as ['length:40',runs/other/reward].",
        role="reward",
    )
    prompted: str | None = key(
        "Policy that is shown demonstrations before each prompt, as InstructGPT's prompted GPT-3; "
        "null judges none.",
        role="policy",
    )
    few_shot: str | None = key(
        "What it is shown: a file of demonstrations, or how many of the first that `data` has to "
        "learn from.",
        used_by="prompted",
        needed=True,
    )
    best_of: str | None = key(
        "Policy that is judged as the best of best_of_n responses by `reward`, as a policy of its "
        "own; null judges none.",
        role="policy",
    )
    best_of_n: int | None = key(
        "Responses that the best one is chosen from; so many times algo.samples are sampled.",
        ge=2,
        used_by="best_of",
        needed=True,
    )
    samples: str | None = key(
        "File of responses to judge in place of policies: rows of prompt, response and policy, as "
        "samples.jsonl has them. `policy` then gives the tokenizer alone."
    )
    responses_cache: str | None = key(
        "Folder that keeps responses by the content of policy, prompts and sampling, for other "
        "evaluations; null keeps none."
    )
    choices: str | None = key(
        "File of multiple-choice or cloze rows {prompt, choices, answer} that each policy is asked."
    )
    judge_samples: int = key(
        "Responses of each policy to a prompt that a judge reads: the first one of each with the "
        "first one of the other, and so on, up to algo.samples.",
        ge=1,
        used_by="judge",
        unused=1,
    )
    judge_rows: int = key(
        "Held-out preferences of `data` that the judge is asked, to tell how often it agrees with "
        "people; 0 asks none.",
        ge=0,
        used_by="judge",
        unused=50,
    )
    anchor: str | None = key(
        "Policy whose rating is 0; null takes `reference` where that is judged, or the last one."
    )
    algo: EvaluateAlgo
