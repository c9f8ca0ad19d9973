"""Every key of every stage: its name, type, bound and meaning. Values live in conf/*.yaml only.

A field without a default is mandatory for OmegaConf, so a key that is forgotten in YAML fails by
name. `rlhf-cli STAGE --help` prints these sentences; `validate` in compose.py enforces the bounds.
"""

from dataclasses import dataclass, field
from typing import Any


def key(
    meaning: str,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    choices: tuple[str, ...] | None = None,
) -> Any:
    """A mandatory dataclass field that carries one sentence and, optionally, bounds or choices."""
    bounds = {"ge": ge, "gt": gt, "le": le, "lt": lt, "choices": choices}
    given = {name: bound for name, bound in bounds.items() if bound is not None}
    return field(metadata={"meaning": meaning, **given})


# --------------------------------------------------------------------------- hardware


@dataclass
class Hardware:
    """Speed and memory only: no key here changes the mathematics (but which units drop out)."""

    device: str = key(
        "Where tensors live; auto takes cuda if there is one.", choices=("auto", "cpu", "cuda")
    )
    threads: int | None = key("CPU threads of torch; null leaves torch's own choice.", ge=1)
    tokens_per_microbatch: int = key(
        "Padded tokens in one forward and backward pass; halve it when memory runs out.", ge=1
    )
    rollout_tokens: int = key(
        "Padded tokens whose keys and values are cached at once while sampling.", ge=1
    )
    share_prompts: bool = key(
        "Compute a prompt once for all of its responses where the model and the lengths allow it."
    )
    logprob_chunk: int = key(
        "Positions whose logits exist at once; memory is this times the vocabulary.", ge=1
    )
    gradient_checkpointing: bool = key("Recompute activations in backward: less memory, slower.")
    save_every: int | None = key(
        "Optimizer steps (ppo, grpo: iterations) between resume points; null keeps none.", ge=1
    )


# --------------------------------------------------------------------------- model


@dataclass
class FrozenModel:
    """How weights are held by a stage that does not train them."""

    dtype: str = key(
        "Type of matrix products; weights stay float32. bfloat16 needs a GPU to be fast.",
        choices=("float32", "bfloat16"),
    )
    trust_remote_code: bool = key("Run Python code that a model folder brings along.")


@dataclass
class Model(FrozenModel):
    """How the weights of `policy=` are adapted by a stage."""

    lora_rank: int = key("Rank of LoRA adapters on every linear layer; 0 trains all weights.", ge=0)
    lora_alpha: float = key("LoRA scale: the update is multiplied by alpha / rank.", gt=0)
    merge_lora: bool = key("Write merged weights (true) or an adapter folder (false).")
    frozen_layers: int = key(
        "Embeddings and this many of the lowest decoder blocks are not trained, nor an unembedding "
        "that is tied to them; policy and reference share them. 0 trains all.",
        ge=0,
    )


@dataclass
class SftModel(Model):
    """Where sft starts: a pretrained model, or a small decoder built from scratch."""

    path: str | None = key("Hub id or folder of a pretrained model; null builds one from scratch.")
    dropout: float = key("Residual dropout while sft trains; InstructGPT used 0.2.", ge=0, lt=1)
    vocab_size: int | None = key("From scratch: tokens of the BPE that is learned.", ge=260)
    hidden_size: int | None = key("From scratch: width; doubling costs four times the time.", ge=8)
    layers: int | None = key("From scratch: decoder blocks.", ge=1)
    heads: int | None = key("From scratch: attention heads; must divide hidden_size.", ge=1)
    context: int | None = key("From scratch: longest sequence in tokens.", ge=8)


# --------------------------------------------------------------------------- data


@dataclass
class Data:
    """Where rows come from, how they become tokens, and what is held out."""

    format: str = key(
        "How rows are stored: the shipped demo, JSONL rows, HH dialogues, GSM8K problems, or "
        "GSM8K model solutions with their correctness.",
        choices=("demo", "rows", "hh", "gsm8k", "gsm8k_solutions"),
    )
    path: str | None = key("File, folder of files or hub dataset; generate also takes - (stdin).")
    eval_path: str | None = key("Held-out rows; null holds out eval_rows of path.")
    eval_rows: int = key(
        "Prompts held out of path, with all their rows, when there is no eval_path.", ge=1
    )
    max_rows: int | None = key("Use the first rows only; null uses all.", ge=1)
    text_path: str | None = key("Plain text rows for the pretraining mix (ptx_coef, text_mix).")
    columns: dict[str, str] = key("Your column names for ours, as {ours: yours}.")
    template: str = key(
        "How a prompt is written: text with {prompt} in it (\\n breaks a line), or chat (the "
        "tokenizer's template)."
    )
    max_prompt_tokens: int = key("Longest prompt in tokens.", ge=1)
    max_response_tokens: int = key("Longest response in tokens, trained on or sampled.", ge=1)
    long_prompts: str = key(
        "Prompts over the limit: stop, drop the row, or cut their start.",
        choices=("error", "drop", "cut"),
    )
    bad_rows: str = key(
        "Rows that are empty or misshapen: stop at the first, or drop and count them.",
        choices=("error", "drop"),
    )
    convert: list[str] = key(
        "Feedback may be turned into other kinds, in this order; nothing is turned unasked.",
        choices=(
            "feedback_to_ranking",
            "feedback_to_steps",
            "preference_to_feedback",
            "preference_to_ranking",
            "ranking_to_preference",
        ),
    )
    doubtful_pairs: str = key(
        "Pairs of identical sides, pairs labelled both ways, one side always the longer: count and "
        "keep, drop the first two, or stop.",
        choices=("keep", "drop", "error"),
    )
    step_join: str = key("Text between the steps of a row when they become one response.")
    step_end: str = key("Regular expression whose matches end a step of a response.")
    gold: str | None = key("Scorer that training never sees; evaluate reports it.")


# --------------------------------------------------------------------------- algo


@dataclass
class Optimizer:
    """AdamW and its schedule, as every training stage uses it."""

    lr: float = key("Peak learning rate.", gt=0)
    lr_schedule: str = key(
        "Shape after warmup; cosine ends at min_lr_ratio of the peak, linear at zero.",
        choices=("cosine", "linear", "constant"),
    )
    min_lr_ratio: float = key("Cosine only: final over peak learning rate.", ge=0, le=1)
    warmup_steps: int = key("Optimizer steps of linear warmup from zero.", ge=0)
    adam_beta1: float = key("Decay of the gradient mean.", ge=0, lt=1)
    adam_beta2: float = key("Decay of the squared-gradient mean.", ge=0, lt=1)
    adam_eps: float = key("Added to the root of the second moment; PPO papers use 1e-5.", gt=0)
    weight_decay: float = key("Decoupled weight decay.", ge=0)
    max_grad_norm: float | None = key("Global gradient norm is cut to this; null never cuts.", gt=0)


@dataclass
class SftAlgo(Optimizer):
    """Supervised fine-tuning."""

    epochs: int = key("Passes over the demonstrations.", ge=1)
    max_steps: int | None = key("Stop after this many optimizer steps; null runs all epochs.", ge=1)
    batch_size: int = key("Sequences per optimizer step.", ge=1)
    text_mix: float | None = key(
        "Plain-text rows per demonstration row (InstructGPT before PPO: 0.1); null takes all "
        "that data.text_path or the demo has.",
        ge=0,
    )
    eval_every: int = key("Optimizer steps between evaluations of the held-out loss.", ge=1)
    keep: str = key("Which weights are written.", choices=("best", "last"))


@dataclass
class RewardAlgo(Optimizer):
    """Reward model: what it learns from, and by which loss."""

    loss: str = key(
        "What the scores are fitted to: pairs (bradley_terry, token), rankings (kwise, "
        "plackett_luce), judgements of one response (pointwise) or of its steps (steps).",
        choices=("bradley_terry", "kwise", "plackett_luce", "pointwise", "steps", "token"),
    )
    row_margin: bool | None = key(
        "Pairs: subtract the row's margin column, as Llama 2 did; null where the loss has none."
    )
    label_smoothing: float | None = key(
        "Pairs: assumed share of flipped labels; null where the loss has none.", ge=0, lt=0.5
    )
    centring: float | None = key(
        "Pairs: weight of (r_w + r_l)^2, which keeps scores around 0; TRL suggests 0.01.", ge=0
    )
    target: str | None = key(
        "Pointwise: fit the label (logistic) or the score (regression); null for other losses.",
        choices=("label", "score"),
    )
    aggregate: str | None = key(
        "How scores within a response become its own: of steps the product of their "
        "probabilities or the least of them, of tokens the mean or the sum.",
        choices=("product", "min", "mean", "sum"),
    )
    epochs: int = key("Passes over the rows; more than one overfits (InstructGPT).", ge=1)
    batch_size: int = key(
        "Rows per optimizer step: pairs, prompts with a ranking, or responses.", ge=1
    )
    eval_every: int = key("Optimizer steps between evaluations on held-out rows.", ge=1)


@dataclass
class PpoAlgo(Optimizer):
    """PPO as in InstructGPT."""

    steps: int = key("Iterations of rollout and update.", ge=1)
    batch_size: int = key("Rollouts per iteration, one per prompt.", ge=1)
    minibatch_size: int = key("Rollouts per optimizer step; must divide batch_size.", ge=1)
    epochs: int = key("Passes over each batch of rollouts; InstructGPT 1, Stiennon 4.", ge=1)
    value_lr: float = key("Peak learning rate of the critic.", gt=0)
    kl_coef: float = key("Weight of the per-token KL to the reference in the reward.", ge=0)
    kl_controller: str = key(
        "Keep kl_coef, or steer it to kl_target (Ziegler's proportional, Schulman's 1.5/2 rule).",
        choices=("fixed", "ziegler", "schulman"),
    )
    kl_target: float | None = key("KL per response, in nats, that a controller aims at.", gt=0)
    kl_horizon: int | None = key("Ziegler: rollouts over which kl_coef adapts.", ge=1)
    gamma: float = key("Discount per token.", gt=0, le=1)
    lam: float = key("Lambda of generalised advantage estimation.", ge=0, le=1)
    clip: float = key("The probability ratio is clipped to 1 - clip .. 1 + clip.", gt=0)
    value_clip: float | None = key("Values stay this close to their old ones; null: free.", gt=0)
    vf_coef: float = key(
        "Weight of the value loss; the critic has its own AdamW, so value_lr matters more.", ge=0
    )
    entropy_coef: float = key("Weight of the entropy bonus.", ge=0)
    whiten_advantages: bool = key("Advantages get mean 0, variance 1 over a batch of rollouts.")
    missing_eos_reward: float | None = key(
        "Reward of a response that never ended, in place of its score; null keeps the score."
    )
    temperature: float = key("Sampling temperature, also where log-probs are scored.", gt=0)
    max_tokens: int = key("Longest sampled response in tokens.", ge=1)
    ptx_coef: float = key("Weight of the pretraining loss in each step; InstructGPT 27.8.", ge=0)
    ptx_batch_size: int = key("Plain-text rows per optimizer step when ptx_coef > 0.", ge=1)
    show_every: int = key("Iterations between tables of sample rollouts.", ge=1)


@dataclass
class DpoAlgo(Optimizer):
    """Preference objectives: DPO, its family, and the baselines of its paper."""

    loss: str = key(
        "The objective; README.md has a table of formulas.",
        choices=(
            "dpo",
            "length_normalised",
            "robust",
            "ipo",
            "ipo_mean",
            "hinge",
            "plackett_luce",
            "kto",
            "orpo",
            "simpo",
            "preferred_ft",
            "unlikelihood",
        ),
    )
    beta: float | None = key("Scale of implicit rewards; larger stays closer to reference.", gt=0)
    tau: float | None = key("IPO: the margin settles at 1 / (2 tau).", gt=0)
    label_smoothing: float | None = key(
        "Assumed share of flipped labels (dpo: cDPO; robust: unbiased).", ge=0, lt=0.5
    )
    gamma: float | None = key("SimPO: margin that beta times the difference must pass.", ge=0)
    lam: float | None = key("ORPO: weight of the odds ratio beside the likelihood.", ge=0)
    alpha: float | None = key("Unlikelihood: weight of the rejected side's log-prob.", ge=0)
    desirable_weight: float | None = key(
        "KTO: weight of good responses; null with undesirable_weight null balances the classes.",
        ge=0,
    )
    undesirable_weight: float | None = key("KTO: weight of bad responses.", ge=0)
    sft_coef: float = key("Weight of the mean NLL of chosen responses, added to any loss.", ge=0)
    epochs: int = key("Passes over the rows.", ge=1)
    batch_size: int = key("Rows per optimizer step: pairs, rankings or responses.", ge=1)
    precompute_reference: bool = key(
        "Score all rows before training, keep that on disk, and free the reference model."
    )
    bootstrap_epochs: int | None = key(
        "reference=bootstrap: passes of SFT over the chosen side; null takes 1.", ge=1
    )
    bootstrap_lr: float | None = key(
        "reference=bootstrap: peak learning rate of that SFT; null takes algo.lr.", gt=0
    )
    eval_every: int = key("Optimizer steps between evaluations on held-out rows.", ge=1)


@dataclass
class GrpoAlgo(Optimizer):
    """Group-relative policy optimisation, outcome supervision."""

    steps: int = key("Iterations of rollout and update.", ge=1)
    batch_size: int = key("Prompts per iteration.", ge=1)
    group_size: int = key("Responses per prompt; the paper uses 64.", ge=2)
    minibatch_size: int = key("Prompts per optimizer step; must divide batch_size.", ge=1)
    epochs: int = key("Passes over each batch of rollouts; the paper uses 1.", ge=1)
    kl_coef: float = key("Weight of the KL to the reference in the loss; the paper 0.04.", ge=0)
    clip: float = key("The probability ratio is clipped to 1 - clip .. 1 + clip.", gt=0)
    missing_eos_reward: float | None = key(
        "Reward of a response that never ended, in place of its score; null keeps the score."
    )
    temperature: float = key("Sampling temperature, also where log-probs are scored.", gt=0)
    max_tokens: int = key("Longest sampled response in tokens.", ge=1)
    show_every: int = key("Iterations between tables of sample rollouts.", ge=1)


@dataclass
class Decoding:
    """How tokens are chosen."""

    temperature: float = key("Divides the logits; 0 is greedy.", ge=0)
    top_k: int = key("Sample from the k likeliest tokens only; 0 is off.", ge=0)
    top_p: float = key("Smallest set of tokens whose mass reaches p; 1 is off.", gt=0, le=1)
    min_p: float = key("Tokens at least this likely beside the likeliest; 0 is off.", ge=0, le=1)
    repetition_penalty: float = key("Above 1 makes tokens already seen unlikelier.", gt=0)
    beams: int = key("Beam search over this many hypotheses; 1 is off.", ge=1)
    length_penalty: float = key("Beam score is log-prob / length ** this.")
    min_tokens: int = key("No response ends before this many tokens.", ge=0)
    max_tokens: int = key("Longest response in tokens.", ge=1)
    samples: int = key("Responses per prompt.", ge=1)
    stop: list[str] = key("Strings that end a response; they are not part of it.")


@dataclass
class GenerateAlgo(Decoding):
    """Sampling."""

    prompts: int | None = key("Use the first prompts only; null uses all.", ge=1)


@dataclass
class EvaluateAlgo(Decoding):
    """Evaluation on held-out prompts."""

    prompts: int | None = key("Held-out prompts; null uses all.", ge=2)
    tie: float = key("Reward differences up to this are ties in win rates.", ge=0)


# --------------------------------------------------------------------------- stages


@dataclass
class Run:
    """What every stage has."""

    name: str = key("Name of the chain; default paths lie under runs/NAME.")
    out: str = key("Folder that the stage writes.")
    seed: int = key("Fixes initialisation, data order and sampling.", ge=0)
    overwrite: bool = key("Start afresh in an out folder that another config made.")
    data: Data
    hardware: Hardware


@dataclass
class Sft(Run):
    """Supervised fine-tuning: demonstrations -> policy."""

    select_by: str = key(
        "How algo.keep=best chooses: lowest held-out loss, or highest mean reward of responses to "
        "held-out prompts (InstructGPT).",
        choices=("loss", "reward"),
    )
    reward: str | None = key(
        "select_by=reward: what scores responses; models, rules and functions, as in ppo."
    )
    reward_timeout: float = key("Seconds that an async reward function has for one response.", gt=0)
    model: SftModel
    algo: SftAlgo


@dataclass
class Reward(Run):
    """Reward model: policy trunk and feedback -> classifier with one label."""

    policy: str = key("Policy folder or hub id whose trunk is used.")
    model: Model
    algo: RewardAlgo


@dataclass
class Ppo(Run):
    """PPO and PPO-ptx: policy, reward and prompts -> policy."""

    policy: str = key("Policy folder or hub id to start from; also the reference.")
    reward: str = key(
        "Sum of terms, as in DIR + 0.2*length:20: reward folders or hub ids, dpo outputs (implicit "
        "rewards), rules, and functions as file.py:name."
    )
    reward_timeout: float = key("Seconds that an async reward function has for one response.", gt=0)
    model: Model
    algo: PpoAlgo


@dataclass
class Dpo(Run):
    """Direct preference optimisation and its family: policy and feedback -> policy."""

    policy: str = key("Policy folder or hub id to start from.")
    reference: str | None = key(
        "null: the policy as it starts; a folder or hub id; or bootstrap: SFT on the chosen side "
        "first, from which both policy and reference start."
    )
    reference_cache: str | None = key(
        "Folder that keeps precomputed log-probs of the reference; null keeps none."
    )
    model: Model
    algo: DpoAlgo


@dataclass
class Grpo(Run):
    """GRPO: policy, reward or verifier, and prompts -> policy."""

    policy: str = key("Policy folder or hub id to start from; also the reference.")
    reward: str = key(
        "Sum of terms, as in DIR + 0.2*length:20: reward folders or hub ids, dpo outputs (implicit "
        "rewards), rules, and functions as file.py:name."
    )
    reward_timeout: float = key("Seconds that an async reward function has for one response.", gt=0)
    model: Model
    algo: GrpoAlgo


@dataclass
class Generate(Run):
    """Sampling: policy and prompts -> samples.jsonl."""

    policy: str = key("Policy folder or hub id to sample from.")
    reward: str | None = key(
        "What scores the samples: models, rules and functions, as in ppo; null: nothing."
    )
    reward_timeout: float = key("Seconds that an async reward function has for one response.", gt=0)
    model: FrozenModel
    algo: GenerateAlgo


@dataclass
class Evaluate(Run):
    """Evaluation: policy, baselines, reward -> report.json."""

    policy: str = key("Policy folder or hub id to judge.")
    baselines: list[str] | None = key(
        "Policies to compare with; null takes the finished policies beside `policy`."
    )
    reference: str | None = key("Policy that KL is measured to; null measures none.")
    reward: str | None = key(
        "Models, rules and functions that score responses, as in ppo; null reports gold only."
    )
    reward_timeout: float = key("Seconds that an async reward function has for one response.", gt=0)
    gold: str | None = key("Scorer that training never saw; null reports the reward only.")
    model: FrozenModel
    algo: EvaluateAlgo


STAGES: dict[str, type[Run]] = {
    "sft": Sft,
    "reward": Reward,
    "ppo": Ppo,
    "dpo": Dpo,
    "grpo": Grpo,
    "generate": Generate,
    "evaluate": Evaluate,
}
