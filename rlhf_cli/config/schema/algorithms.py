"""Keys of the group algo: what each stage computes, and by which numbers."""

from dataclasses import dataclass

from rlhf_cli.config.schema.keys import AUTO, OPTIONS, key

PAIR = (
    *("chosen_logps", "rejected_logps", "reference_chosen_logps", "reference_rejected_logps"),
    *("chosen_lengths", "rejected_lengths"),
)
"""What a user's preference loss may be given of N pairs: (N,) each."""

TOKENS = ("logprobs", "old_logprobs", "reference_logprobs", "advantages", "mask")
"""What a user's policy loss may be given of the tokens of B responses: (B, T) each."""


@dataclass
class Algo:
    """What a stage computes, and by which numbers."""


@dataclass
class OptimizerConfig(Algo):
    """AdamW and its schedule, as every training stage uses it."""

    lr: float | None = key(
        "Peak learning rate; null: by the size of the model, as the start of a run shows.", gt=0
    )
    lr_schedule: str = key(
        "Shape after warmup; cosine ends at min_lr_ratio of the peak, linear at zero.",
        choices=("cosine", "linear", "constant"),
    )
    min_lr_ratio: float = key(
        "Final over peak learning rate.", ge=0, le=1, used_by="algo.lr_schedule=cosine", unused=0
    )
    warmup_steps: int = key("Optimizer steps of linear warmup from zero.", ge=0)
    adam_beta1: float = key("Decay of the gradient mean.", ge=0, lt=1)
    adam_beta2: float = key("Decay of the squared-gradient mean.", ge=0, lt=1)
    adam_eps: float = key("Added to the root of the second moment; PPO papers use 1e-5.", gt=0)
    weight_decay: float = key("Decoupled weight decay.", ge=0)
    max_grad_norm: float | None = key("Global gradient norm is cut to this; null never cuts.", gt=0)
    max_skipped: int = key(
        "Steps in a row whose loss or gradient is not finite, each of them skipped, that end the "
        "run with a diagnosis.",
        ge=1,
    )

    @property
    def rate(self) -> float:
        """lr, which runs/rates.py has filled in before anything trains."""
        assert self.lr is not None
        return self.lr


@dataclass
class SftAlgo(OptimizerConfig):
    """Supervised fine-tuning."""

    loss: str = key(
        "What tokens are fitted to: those of the responses (nll), or the distributions that the "
        "model of the start has there under data.prefix (distill).",
        choices=("nll", "distill"),
    )
    epochs: int = key("Passes over the demonstrations.", ge=1)
    max_steps: int | None = key("Stop after this many optimizer steps; null runs all epochs.", ge=1)
    batch_size: int = key("Sequences per optimizer step.", ge=1)
    text_mix: float | None = key(
        "Plain-text rows per demonstration row (InstructGPT before PPO: 0.1); null takes all "
        "that data.text_path or the demo has.",
        ge=0,
    )
    eval_every: int = key("Optimizer steps between evaluations of the held-out loss.", ge=1)
    snapshot_every: int | None = key(
        "Optimizer steps between policies that are kept as out/step-N beside the last; null: none.",
        ge=1,
    )
    keep: str = key("Which weights are written.", choices=("best", "last"))


@dataclass
class RewardAlgo(OptimizerConfig):
    """Reward model: what it learns from, and by which loss."""

    loss: str = key(
        "What the scores are fitted to: pairs (bradley_terry, token), rankings (kwise, "
        "plackett_luce), judgements of one response (pointwise) or of its steps (process).",
        choices=OPTIONS,
    )
    row_margin: bool | None = key(
        "Subtract the row's margin column, as Llama 2 did.", used_by=OPTIONS, needed=True
    )
    label_smoothing: float | None = key(
        "Assumed share of flipped labels.", ge=0, lt=0.5, used_by=OPTIONS, needed=True
    )
    soft_labels: bool | None = key(
        "Take the row's column p for the chance that its chosen side is better, as RLAIF did with "
        "what a judge says.",
        used_by=OPTIONS,
        needed=True,
    )
    centring: float | None = key(
        "Weight of (r_w + r_l)^2, which keeps scores around 0; TRL suggests 0.01.",
        ge=0,
        used_by=OPTIONS,
        needed=True,
    )
    target: str | None = key(
        "Fit the label (logistic) or the score (regression).",
        choices=("label", "score"),
        used_by=OPTIONS,
        needed=True,
    )
    aggregate: str | None = key(
        "How scores within a response become its own: of steps the product of their "
        "probabilities or the least of them, of tokens the mean or the sum.",
        choices=("product", "min", "mean", "sum"),
        used_by=OPTIONS,
        needed=True,
    )
    epochs: int = key("Passes over the rows; more than one overfits (InstructGPT).", ge=1)
    max_steps: int | None = key("Stop after this many optimizer steps; null runs all epochs.", ge=1)
    batch_size: int = key(
        "Rows per optimizer step: pairs, prompts with a ranking, or responses.", ge=1
    )
    eval_every: int = key("Optimizer steps between evaluations on held-out rows.", ge=1)
    keep: str = key(
        "Weights that are written: the last, or those with the lowest loss, as it is trained, on "
        "held-out rows.",
        choices=("best", "last"),
    )


CLIPPED = "algo.loss=clip|sequence_clip|cispo"


@dataclass
class OnlineAlgo(OptimizerConfig):
    """What learning from sampled responses has in common."""

    steps: int = key("Iterations of rollout and update.", ge=1)
    batch_size: int = key("Prompts per iteration.", ge=1)
    minibatch_size: int = key("Prompts per optimizer step; must divide batch_size.", ge=1)
    epochs: int = key(
        "Passes over each batch of rollouts; InstructGPT and GRPO 1, Stiennon 4.", ge=1
    )
    temperature: float = key("Sampling temperature, also where log-probs are scored.", gt=0)
    temperature_end: float | None = key(
        "Temperature of the last iteration, reached linearly; null keeps the first.", gt=0
    )
    max_tokens: int | None = key(
        "Longest sampled response in tokens; null is the longest that the policy learnt from, or "
        "256, and at most half of its positions.",
        ge=1,
    )
    kl_coef: float = key("Weight of the KL to the reference, in the reward or in the loss.", ge=0)
    kl_coef_end: float | None = key(
        "kl_coef of the last iteration, reached linearly; null keeps the first.", ge=0
    )
    kl_in: str = key(
        "Where the KL is charged: in the reward of each token, or as a term of the loss.",
        choices=("reward", "loss"),
    )
    kl_estimator: str = key(
        "In the reward k1. In the loss k2 or weighted_k3 (pi/pi_old times k3; right in later "
        "epochs too), whose gradient is that of KL(pi || ref); full (exact, over the vocabulary); "
        "k3 as GRPO published it, whose gradient is that of KL(ref || pi).",
        choices=("k1", "k2", "k3", "weighted_k3", "full"),
    )
    clip: float | None = key(
        "The ratio pi / pi_old is clipped to 1 - clip .. 1 + clip.",
        gt=0,
        used_by=CLIPPED,
        needed="algo.loss=clip|sequence_clip",
    )
    clip_high: float | None = key(
        "Upper clip where it differs; DAPO 0.28 beside a clip of 0.2.",
        gt=0,
        used_by=CLIPPED,
        needed="algo.loss=cispo",
    )
    dual_clip: float | None = key(
        "Where A < 0 the loss is at most this times -A (1912.09729: 3); null: unbounded.",
        gt=1,
        used_by="algo.loss=clip",
    )
    rollout_correction: str | None = key(
        "What is learnt from a sample weighs pi_old / pi_sampler, of each token or of the whole "
        "response, up to rollout_correction_cap. auto: token (sequence where the loss has a ratio "
        "of responses) where an engine of its own sampled, else as null, which weighs all alike.",
        choices=(AUTO, "token", "sequence"),
    )
    rollout_correction_cap: float = key(
        "The largest such weight; verl takes 2, TRL 3.",
        ge=1,
        used_by="algo.rollout_correction",
        unused=2.0,
    )
    entropy_coef: float = key("Weight of the entropy bonus.", ge=0)
    supervision: str = key(
        "Rewards of whole responses, or of each step of a response (step model or function).",
        choices=("outcome", "process"),
    )
    scale_rewards: bool = key("Divide rewards by their running standard deviation.")
    reward_clip: float | None = key(
        "Scores are cut to -this .. this, before penalties; null: never.", gt=0
    )
    missing_eos_reward: float | None = key(
        "Reward of a response that never ended, in place of its score; null keeps the score."
    )
    missing_eos_penalty: float = key(
        "Subtracted from the reward of a response that never ended.", ge=0
    )
    length_penalty: float = key("Subtracted from the reward per response token.", ge=0)
    overlong_tokens: float | None = key(
        "The last this many tokens before max_tokens, or below 1 this share of them, cost up to 1, "
        "linearly (DAPO's soft overlong punishment); null: nothing.",
        gt=0,
    )
    mask_truncated: bool = key("Learn nothing from responses that never ended.")
    ema_decay: float | None = key(
        "Write an exponential average of the weights, updated each optimizer step; InstructGPT "
        "0.992.",
        gt=0,
        lt=1,
    )
    keep: str = key(
        "Weights that are written: the last, or those with the best value of a metric.",
        choices=("last", "reward", "rlhf_reward", "eval/reward", "eval/gold"),
    )
    eval_every: int | None = key(
        "Iterations between evaluations on held-out prompts (reward, gold, KL); null: none.", ge=1
    )
    snapshot_every: int | None = key(
        "Iterations between policies that are kept as out/step-N beside the last; null: none.",
        ge=1,
    )
    eval_prompts: int = key("Held-out prompts of such an evaluation, one response each.", ge=1)
    max_kl: float | None = key("Alarm: KL to the reference per response, in nats.", gt=0)
    target_reward: float | None = key("Alarm: the mean reward has come up to this.")
    min_entropy: float | None = key("Alarm: entropy per token, in nats, has come down to this.")
    max_length_drift: float | None = key(
        "Alarm: the mean length has changed by this share of that of the first iteration.", gt=0
    )
    max_repetition: float | None = key(
        "Alarm: share of 4-grams of tokens that the response has had before.", gt=0, lt=1
    )
    max_truncated: float | None = key("Alarm: share of responses that never ended.", ge=0, lt=1)
    max_sampling_gap: float | None = key(
        "Alarm: what sampling and training compute differently, mean per token, in nats; or 3 "
        "times that of the first iteration, and 0.03 at least, where this is less.",
        gt=0,
    )
    overoptimised: int | None = key(
        "Alarm: held-out reward up while gold is down for this many evaluations in a row.", ge=1
    )
    alarm_steps: int = key("Iterations in a row that a limit is broken before it counts.", ge=1)
    stop_on: list[str] = key(
        "Alarms that end the run; the others are shown and logged.",
        choices=(
            *("kl", "reward", "entropy", "length", "repetition", "truncated", "sampling_gap"),
            "overoptimised",
        ),
    )
    show_every: int = key("Iterations between tables of sample rollouts.", ge=1)

    @property
    def sampled_tokens(self) -> int:
        """max_tokens, once runs/inherited.py has filled it in."""
        assert self.max_tokens is not None
        return self.max_tokens


CRITIC = "algo.baseline=critic"


@dataclass
class PpoAlgo(OnlineAlgo):
    """One response per prompt; a critic, a mean or nothing as baseline."""

    loss: str = key(
        "Clipped ratio (clip), penalty on the KL to the old policy (klpen), or the plain "
        "log-derivative (policy_gradient: A2C, REINFORCE); or yours.",
        choices=("clip", "klpen", "policy_gradient"),
        own=(*TOKENS, "clip", "clip_high", "dual_clip"),
    )
    old_kl_coef: float | None = key(
        "First weight of KL(old || new) per token.", gt=0, used_by="algo.loss=klpen", needed=True
    )
    old_kl_target: float | None = key(
        "KL(old || new) per token, in nats; below 1/1.5 of it the weight is halved, above 1.5 of "
        "it doubled; null keeps the weight.",
        gt=0,
        used_by="algo.loss=klpen",
    )
    baseline: str = key(
        "What is subtracted from returns: a critic's values, the mean return of the other "
        "responses of the batch, or nothing.",
        choices=("critic", "mean", "none"),
    )
    critic: str | None = key(
        "A network of its own, or a value head on the policy's trunk.",
        choices=("separate", "shared"),
        used_by=CRITIC,
        needed=True,
    )
    value_lr: float | None = key(
        "Peak learning rate of the critic or its head; null: by the size of the model.",
        gt=0,
        used_by=CRITIC,
    )
    vf_coef: float | None = key(
        "Weight of the value loss; a separate critic has its own AdamW, so value_lr matters more.",
        ge=0,
        used_by=CRITIC,
        needed=True,
    )
    value_clip: float | None = key(
        "Values stay this close to their old ones; null: free.", gt=0, used_by=CRITIC
    )
    lam: float | None = key(
        "Lambda of generalised advantage estimation.", ge=0, le=1, used_by=CRITIC, needed=True
    )
    gamma: float = key("Discount per token.", gt=0, le=1)
    kl_controller: str = key(
        "Keep kl_coef, or steer it to kl_target (Ziegler's proportional, Schulman's 1.5/2 rule).",
        choices=("fixed", "ziegler", "schulman"),
    )
    kl_target: float | None = key(
        "KL per response, in nats, that a controller aims at.",
        gt=0,
        used_by="algo.kl_controller=ziegler|schulman",
        needed=True,
    )
    kl_horizon: int | None = key(
        "Rollouts over which kl_coef adapts.",
        ge=1,
        used_by="algo.kl_controller=ziegler",
        needed=True,
    )
    whiten_rewards: str = key(
        "Per-token rewards, KL included, over the batch of tokens: as they are; divided by their "
        "standard deviation (scale); or so divided around their mean (whiten, as OpenAI's code "
        "does), which pays or charges each token what the mean was scaled by.",
        choices=("none", "scale", "whiten"),
    )
    normalise_advantages: str = key(
        "batch: mean 0, variance 1 over the tokens of a batch of rollouts.",
        choices=("batch", "none"),
    )
    ptx_coef: float = key("Weight of the pretraining loss in each step; InstructGPT 27.8.", ge=0)
    ptx_batch_size: int = key("Plain-text rows per optimizer step when ptx_coef > 0.", ge=1)


@dataclass
class DpoAlgo(OptimizerConfig):
    """Preference objectives: DPO, its family, and the baselines of its paper."""

    loss: str = key(
        "The objective, a shipped one or yours; docs/feedback.md has the formulas.",
        choices=OPTIONS,
        own=(*PAIR, "beta", "tau", "label_smoothing", "gamma", "lam", "alpha"),
    )
    beta: float | None = key(
        "Scale of implicit rewards; larger stays closer to reference.",
        gt=0,
        used_by=OPTIONS,
        needed=True,
    )
    tau: float | None = key(
        "The margin settles at 1 / (2 tau).", gt=0, used_by=OPTIONS, needed=True
    )
    label_smoothing: float | None = key(
        "Assumed share of flipped labels (dpo: cDPO; robust: unbiased).",
        ge=0,
        lt=0.5,
        used_by=OPTIONS,
        needed=True,
    )
    soft_labels: bool = key(
        "Take the row's column p for the chance that its chosen side is better: the target of "
        "sigmoid(beta h), and (2p - 1) / (2 tau) that of IPO's margin.",
        used_by="algo.loss=dpo|length_normalised|ipo|ipo_mean",
        unused=False,
    )
    gamma: float | None = key(
        "Margin that beta times the difference must pass.", ge=0, used_by=OPTIONS, needed=True
    )
    lam: float | None = key(
        "Weight of the odds ratio beside the likelihood.", ge=0, used_by=OPTIONS, needed=True
    )
    alpha: float | None = key(
        "Weight of the rejected side's log-prob.", ge=0, used_by=OPTIONS, needed=True
    )
    desirable_weight: float | None = key(
        "Weight of good responses; null with undesirable_weight null balances the classes.",
        ge=0,
        used_by="algo.loss=kto",
    )
    undesirable_weight: float | None = key(
        "Weight of bad responses.", ge=0, used_by="algo.loss=kto"
    )
    sft_coef: float = key("Weight of the mean NLL of chosen responses, added to any loss.", ge=0)
    epochs: int = key("Passes over the rows.", ge=1)
    max_steps: int | None = key("Stop after this many optimizer steps; null runs all epochs.", ge=1)
    batch_size: int = key("Rows per optimizer step: pairs, rankings or responses.", ge=1)
    precompute_reference: bool = key(
        "Score all rows before training, keep that on disk, and free the reference model."
    )
    bootstrap_epochs: int | None = key(
        "Passes of SFT over the chosen side; null takes 1.", ge=1, used_by="reference=bootstrap"
    )
    bootstrap_lr: float | None = key(
        "Peak learning rate of that SFT; null takes algo.lr.", gt=0, used_by="reference=bootstrap"
    )
    eval_every: int = key("Optimizer steps between evaluations on held-out rows.", ge=1)
    snapshot_every: int | None = key(
        "Optimizer steps between policies that are kept as out/step-N beside the last; null: none.",
        ge=1,
    )
    keep: str = key(
        "Weights that are written: the last, or those with the lowest loss, as it is trained, on "
        "held-out rows.",
        choices=("best", "last"),
    )


@dataclass
class GrpoAlgo(OnlineAlgo):
    """Groups of responses to each prompt take the place of a critic."""

    group_size: int = key("Responses per prompt; GRPO's paper uses 64, RLOO's 2 or 4.", ge=1)
    loss: str = key(
        "Ratio clipped per token (clip) or per response (sequence_clip: GSPO), clipped as a "
        "weight (cispo), or the plain log-derivative (policy_gradient: RLOO); or yours.",
        choices=("clip", "sequence_clip", "cispo", "policy_gradient"),
        own=(*TOKENS, "clip", "clip_high", "dual_clip"),
    )
    aggregate: str = key(
        "How tokens are summed: mean of each response, sum over all tokens / their number, sum of "
        "each response / max_tokens, sum of each response.",
        choices=("response_mean", "token_mean", "max_tokens", "response_sum"),
    )
    baseline: str = key(
        "What is subtracted from rewards: the mean of the group, that of the others, or nothing.",
        choices=("group_mean", "leave_one_out", "none"),
    )
    normalise_advantages: str = key(
        "Divide by the group's standard deviation, whiten over the tokens of the batch, or keep.",
        choices=("group", "batch", "none"),
    )
    dynamic_sampling: int = key(
        "Rounds in which groups of equal rewards are replaced by groups of prompts drawn anew "
        "(DAPO's dynamic sampling); 0 keeps them.",
        ge=0,
    )
    refresh_reference: int | None = key(
        "Iterations after which the policy becomes the reference (iterative GRPO); null: never.",
        ge=1,
    )
    refresh_reward: int | None = key(
        "Iterations after which the reward model is trained further, on pairs of responses of "
        "these iterations that `judge` labels; null: never.",
        ge=1,
    )
    refresh_lr: float | None = key(
        "Learning rate, constant over a refresh, which is one pass; null: by the size of the "
        "reward model.",
        gt=0,
        used_by="algo.refresh_reward",
    )
    refresh_batch_size: int | None = key(
        "Pairs per optimizer step of a refresh.",
        ge=1,
        used_by="algo.refresh_reward",
        needed=True,
    )
    refresh_replay: float | None = key(
        "Share of old pairs in each refresh, of preference rows of `data` and of earlier "
        "refreshes; the paper 0.1.",
        ge=0,
        lt=1,
        used_by="algo.refresh_reward",
        needed=True,
    )


@dataclass
class Decoding(Algo):
    """How tokens are chosen."""

    temperature: float = key("Divides the logits; 0 is greedy.", ge=0)
    top_k: int = key("Sample from the k likeliest tokens only; 0 is off.", ge=0)
    top_p: float = key("Smallest set of tokens whose mass reaches p; 1 is off.", gt=0, le=1)
    min_p: float = key("Tokens at least this likely beside the likeliest; 0 is off.", ge=0, le=1)
    repetition_penalty: float = key("Above 1 makes tokens already seen unlikelier.", gt=0)
    beams: int = key("Beam search over this many hypotheses; 1 is off.", ge=1)
    length_penalty: float = key(
        "Beam score is log-prob / length ** this.", used_by="algo.beams>1", unused=1
    )
    min_tokens: int = key("No response ends before this many tokens.", ge=0)
    max_tokens: int | None = key(
        "Longest response in tokens; null is the longest that the policy learnt from, or 256, and "
        "at most half of its positions.",
        ge=1,
    )
    samples: int = key("Responses per prompt.", ge=1)
    stop: list[str] = key("Strings that end a response; they are not part of it.")

    @property
    def sampled_tokens(self) -> int:
        """max_tokens, once runs/inherited.py has filled it in."""
        assert self.max_tokens is not None
        return self.max_tokens


@dataclass
class GenerateAlgo(Decoding):
    """Sampling."""

    prompts: int | None = key("Use the first prompts only; null uses all.", ge=1)
    keep_best: int | None = key(
        "Responses to each prompt, of the highest reward, that become demonstrations.jsonl for sft "
        "(rejection sampling); null picks none.",
        ge=1,
    )
    pairs: str | None = key(
        "What becomes preferences.jsonl for reward and dpo: the response of highest reward over "
        "that of the lowest (best_worst), the policy's over the row's own (above_row), or the "
        "row's own over the policy's (below_row); null makes none.",
        choices=("best_worst", "above_row", "below_row"),
    )
    revisions: int = key(
        "Times that each response is criticised by a principle and revised, before it becomes a "
        "row of demonstrations.jsonl for sft (constitutional AI: 1 to 4); 0 revises none.",
        ge=0,
    )


@dataclass
class LabelAlgo(Decoding):
    """What is asked of whoever labels, and of whom."""

    prompts: int | None = key("Use the first prompts only; null uses all.", ge=1)
    protocol: str = key(
        "What is asked of a task: rank all responses, ties allowed; which of a pair is better, and "
        "by how much; thumbs up or down for one response; a rating from 1 to 7 and eleven marks "
        "for each response, then their ranks (instructgpt: 2203.02155); the first wrong step of "
        "one response (steps).",
        choices=("rank", "pair", "thumbs", "instructgpt", "steps"),
    )
    responses: int = key(
        "Responses in a task of rank and instructgpt; those of a pair are 2, of thumbs and steps "
        "1.",
        ge=2,
        le=9,
        used_by="algo.protocol=rank|instructgpt",
        unused=4,
    )
    tasks: int | None = key(
        "Tasks that are labelled, of all that the responses make; null is one of each prompt, or "
        "each response of thumbs.",
        ge=1,
    )
    select: str = key(
        "How they are chosen: drawn; the largest score difference, with optimism where scorers "
        "differ (gap); what tells most of a reward model's head (fisher); where scorers differ on "
        "which is better (disagree).",
        choices=("random", "gap", "fisher", "disagree"),
    )
    explore: float = key(
        "Share of the tasks that is drawn whatever the rule, by which agreement, ratings and "
        "reward models are measured.",
        ge=0,
        le=1,
        used_by="algo.select=gap|fisher|disagree",
        unused=0.3,
    )
    optimism: float = key(
        "Standard deviations over scorers that gap adds to the mean difference.",
        ge=0,
        used_by="algo.select=gap",
        unused=1.0,
    )
    overlap: float = key(
        "Share of the tasks that every annotator gets, by which their agreement is measured; the "
        "others are dealt out.",
        ge=0,
        le=1,
    )
    repeat: float = key(
        "Share of their tasks that annotators get once more at the end, by which their agreement "
        "with themselves is measured; the second answer enters no row.",
        ge=0,
        le=1,
    )
    anchor_tasks: int = key(
        "Tasks that become anchors, drawn from those that anchors=FOLDER has answers to; the "
        "anchors that it had itself come again whatever their number.",
        ge=1,
        used_by="anchors",
        unused=20,
    )
    aggregate: str = key(
        "What several labels of a task become: a row each, or one by what more than half of them "
        "say, pair by pair.",
        choices=("each", "majority"),
    )


@dataclass
class EvaluateAlgo(Decoding):
    """Evaluation on held-out prompts."""

    prompts: int | None = key("Held-out prompts; null uses all.", ge=2)
    tie: float = key("Reward differences up to this are ties in win rates.", ge=0)
    temperatures: list[float] = key(
        "Temperatures at which win rates are measured, too, beside algo.temperature, which all "
        "other figures are of; 0 is greedy.",
        ge=0,
    )
    enumerate: int = key(
        "Responses of the reference to each prompt, at most, that are enumerated by the likeliest "
        "beginnings, for the optimum that no policy exceeds and the true KL of best of n; 0 "
        "enumerates none. It takes a pass over as many beginnings for every token.",
        ge=0,
    )
    overlap: bool = key(
        "Count what responses copy from the training rows of `data`, which are then read."
    )
