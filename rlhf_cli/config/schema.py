"""Every key of every stage: its name, type, bound and meaning. Values live in conf/*.yaml only.

A field without a default is mandatory for OmegaConf, so a key that is forgotten in YAML fails by
name. `rlhf-cli STAGE --help` prints these sentences; validate.py enforces the bounds, and a value
where something reads a key, and only there.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

AUTO = "auto"
OPTIONS = "what the shipped options say"
"""In `choices` and `used_by`: told by conf/ alone, so that a new loss is told nowhere else.

The values of such a key are those that the shipped options of the stage give it; a key that it
decides about is used by those whose option gives it a value other than null.
"""


PAIR = (
    *("chosen_logps", "rejected_logps", "reference_chosen_logps", "reference_rejected_logps"),
    *("chosen_lengths", "rejected_lengths"),
)
"""What a user's preference loss may be given of N pairs: (N,) each."""

TOKENS = ("logprobs", "old_logprobs", "reference_logprobs", "advantages", "mask")
"""What a user's policy loss may be given of the tokens of B responses: (B, T) each."""


def key(
    meaning: str,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    choices: tuple[str, ...] | str | None = None,
    role: str | None = None,
    own: tuple[str, ...] | None = None,
    used_by: str | None = None,
    needed: bool | str = False,
    unused: Any = None,
    texts: bool = False,
    regex: bool = False,
    auto: type | None = None,
) -> Any:
    """A mandatory dataclass field that carries one sentence and, optionally, bounds or choices.

    Args:
        choices: the values that the key knows, or OPTIONS.
        role: of a key that names models, what they are there: `policy` for folders and hub ids of
            language models, `reward` for sums of terms, as rewards/specs.py reads them.
        own: where the value may be a function of the user's, as path/to/file.py:function, what its
            parameters may be: tensors, and names of keys of the same group.
        used_by: the switch without which nothing reads the key: `algo.loss=clip|cispo` has one of
            these values, `algo.beams>1` is above that, `algo.refresh_reward` is not null; or
            OPTIONS.
        needed: whether null is refused where the key is used, or the switch under which it is.
        unused: the value that the key has where nothing reads it.
        texts: the key takes a text or a list of texts, for which OmegaConf has no type but Any.
        regex: whether the text may hold a regular expression, whose backslashes stay as they are.
            So they do where role is `reward`.
        auto: the type of a key that may be AUTO as well, for which OmegaConf has none but Any.
    """
    bounds = {"ge": ge, "gt": gt, "le": le, "lt": lt, "choices": choices}
    told = {"meaning": meaning, **bounds, "role": role, "own": own, "used_by": used_by}
    given = {name: each for name, each in told.items() if each is not None}
    switches = {"needed": needed, "unused": unused, "texts": texts, "regex": regex, "auto": auto}
    return field(metadata={**given, **switches})


# --------------------------------------------------------------------------- hardware


VLLM = "vllm"
OF_A_CPU = 4096, 16384, 1024
"""What auto means there: tokens in a micro-batch, tokens sampled at once, positions of logits."""


@dataclass
class Hardware:
    """Speed and memory only: no key here changes the mathematics (but which units drop out)."""

    device: str = key(
        "Where tensors live; auto takes cuda if there is one.", choices=(AUTO, "cpu", "cuda")
    )
    threads: int | None = key(
        "CPU threads of torch; null leaves torch's own choice, and is one for models as small as "
        "the demo's.",
        ge=1,
    )
    processes: Any = key(
        "Processes that this command starts to share the work, each with a GPU of its own or with "
        "its share of the CPU's cores; auto: one for each GPU. Those of torchrun and srun are "
        "started already.",
        ge=1,
        auto=int,
    )
    max_restarts: int = key(
        "How often processes that died are started again from the newest resume point.",
        ge=0,
    )
    rank_timeout: int = key(
        "Seconds that processes wait for each other before the run ends, and names the one that "
        "did not come. What rank 0 does for all (rows, rewards, servers, files) may take longer.",
        ge=1,
    )
    tokens_per_microbatch: Any = key(
        "Tokens in one forward and backward pass, pads included; halve it when memory runs out. "
        "auto: as many as the memory of the GPU takes, up to 32768; 4096 on a CPU.",
        ge=1,
        auto=int,
    )
    rollout_tokens: Any = key(
        "Tokens whose keys, values or states are kept at once while sampling. auto: as many as a "
        "quarter of the GPU's free memory takes, up to those of a batch; 16384 on a CPU.",
        ge=1,
        auto=int,
    )
    rollout: str = key(
        "Who samples for ppo, grpo, generate, label and evaluate: this process, or a vLLM server.",
        choices=("native", VLLM),
    )
    rollout_server: Any = key(
        "Address of a running server, as http://host:8000, or of several, as "
        "[http://a:8000,http://b:8000], to which prompts are dealt.",
        texts=True,
        used_by="hardware.rollout=vllm",
    )
    rollout_devices: list[int] | None = key(
        "GPUs of this machine on which the stage starts a server of its own.",
        used_by="hardware.rollout=vllm",
    )
    rollout_sync: str = key(
        "How a server gets the weights of each update: by files in `out`, which its machine sees; "
        "nccl, from GPU to GPU; or of a policy with an adapter that alone.",
        choices=("files", "nccl", "adapter"),
        used_by="hardware.rollout=vllm",
        unused="files",
    )
    rollout_timeout: float = key(
        "Seconds within which a server starts, loads weights or answers a request.",
        gt=0,
        used_by="hardware.rollout=vllm",
        unused=600.0,
    )
    packing: str = key(
        "auto: sequences stand end to end, without pads, where a short try finds the same result; "
        "false: each has a padded row.",
        choices=("auto", "false"),
    )
    share_prompts: bool = key(
        "In packed rows compute a prompt once for all of its responses, where the model allows it."
    )
    logprob_chunk: Any = key(
        "Positions whose logits exist at once; memory is this times the vocabulary. auto: on a GPU "
        "as many as a tenth of its free memory takes, 1024 to 8192; 1024 on a CPU.",
        ge=1,
        auto=int,
    )
    gradient_checkpointing: Any = key(
        "Recompute activations in backward: less memory, slower. auto: in as many blocks as it "
        "takes, once memory runs out.",
        auto=bool,
    )
    compile: Any = key(
        "Compile the decoder's blocks for training passes: one slow step, then faster ones. "
        "auto: on a GPU, where the steps that are left take longer than 3 minutes.",
        auto=bool,
    )
    shard: str = key(
        "Of several processes, what each holds of weights, gradients and moments: none: all; full: "
        "its part of all processes' one copy; hybrid: its part of that of its machine.",
        choices=("none", "full", "hybrid"),
    )
    device_memory: float | None = key(
        "GiB of each device that --check and the start of a run compare its peak with; null: those "
        "of the device at hand.",
        gt=0,
    )
    save_every: str | None = key(
        "Between resume points: optimizer steps (ppo, grpo: iterations), as 25, or minutes, as "
        "10min; null saves when the run is interrupted only."
    )
    keep_checkpoints: int | None = key("Resume points that are kept, the newest ones.", ge=1)

    def measured(self, tokens: int, sampled: int, chunk: int) -> None:
        """What auto means from now on, as runs/budgets.py found it on a GPU."""
        vars(self)["of_the_gpu"] = tokens, sampled, chunk

    @property
    def tokens_at_once(self) -> int:
        """tokens_per_microbatch, or what auto means."""
        given = self.tokens_per_microbatch
        return self._auto[0] if given == AUTO else int(given)

    @property
    def sampled_at_once(self) -> int:
        """rollout_tokens, or what auto means."""
        given = self.rollout_tokens
        return self._auto[1] if given == AUTO else int(given)

    @property
    def logits_at_once(self) -> int:
        """logprob_chunk, or what auto means."""
        given = self.logprob_chunk
        return self._auto[2] if given == AUTO else int(given)

    @property
    def _auto(self) -> tuple[int, int, int]:
        found: tuple[int, int, int] = vars(self).get("of_the_gpu", OF_A_CPU)
        return found


# --------------------------------------------------------------------------- model


SDPA, EAGER = "sdpa", "eager"
ATTENTIONS = (AUTO, SDPA, EAGER, "flash_attention_2", "flash_attention_3", "flex_attention")


@dataclass
class FrozenModel:
    """How weights are held by a stage that does not train them."""

    dtype: str = key(
        "Type that a model computes in; what is trained keeps float32 masters. auto: bfloat16 on "
        "a GPU that has it, but float32 for models as small as the demo's.",
        choices=("auto", "float32", "bfloat16"),
    )
    trust_remote_code: bool = key("Run Python code that a model folder brings along.")
    attention: str = key(
        "How attention is computed; auto is transformers' choice: sdpa, or eager, which holds "
        "tokens x tokens of every head, where a family has no sdpa. Reward models keep auto.",
        choices=ATTENTIONS,
    )


@dataclass
class Model(FrozenModel):
    """How the weights of `policy=` are adapted by a stage."""

    lora_rank: int = key(
        "Rank of the LoRA adapter that is trained; 0 trains all weights. One that goes on keeps "
        "its own.",
        ge=0,
    )
    lora_alpha: float = key("LoRA scale: the update is multiplied by alpha / rank.", gt=0)
    lora_targets: Any = key(
        "Layers that get LoRA matrices: all-linear (all but head and router), a list of names, or "
        "a regular expression that whole names match.",
        texts=True,
        regex=True,
        used_by="model.lora_rank>0",
        unused="all-linear",
    )
    use_rslora: bool = key(
        "Scale by alpha / sqrt(rank), as rsLoRA does (2312.03732).",
        used_by="model.lora_rank>0",
        unused=False,
    )
    use_dora: bool = key(
        "DoRA: lengths of weight rows are trained beside their directions (2402.09353).",
        used_by="model.lora_rank>0",
        unused=False,
    )
    modules_to_save: list[str] = key(
        "Modules trained whole beside LoRA, by name, as [embed_tokens, lm_head].",
        used_by="model.lora_rank>0",
        unused=[],
    )
    adapter: str | None = key(
        "Where policy (sft: path) is an adapter: continue trains it, stack trains a fresh one over "
        "it, merge puts it into the weights first. null: continue if lora_rank > 0, else merge.",
        choices=("continue", "stack", "merge"),
    )
    quantize: str | None = key(
        "Hold the frozen base in 4 bits (nf4) or 8 (int8), as QLoRA does (2305.14314); needs the "
        "extra qlora.",
        choices=("nf4", "int8"),
        used_by="model.lora_rank>0",
    )
    merge_lora: bool = key("Write merged weights (true) or an adapter folder (false).")
    frozen_layers: int = key(
        "Embeddings and this many of the lowest decoder blocks are not trained, nor an unembedding "
        "that is tied to them; policy and reference share them. 0 trains all.",
        ge=0,
    )
    router_aux_coef: float | None = key(
        "Weight of the loss that balances the load of experts (2101.03961 eq. 4); null is what the "
        "model's config says, where that asks for it by output_router_logits.",
        ge=0,
    )
    save_dtype: str = key(
        "Type of the weights that are written; source: the one that they came in.",
        choices=("source", "float32", "bfloat16", "float16"),
    )


@dataclass
class SftModel(Model):
    """Where sft starts: a pretrained model, or a small decoder built from scratch."""

    path: str | None = key(
        "Hub id or folder of a pretrained model; null builds one from scratch.", role="policy"
    )
    size: str | None = key("Which of model.sizes, in a family's option, model.path is.")
    sizes: dict[str, str] = key("Hub ids of a family's option, by how large the models are.")
    dropout: float = key("Residual dropout while sft trains; InstructGPT used 0.2.", ge=0, lt=1)
    lora_dropout: float = key(
        "Dropout of what enters the LoRA matrices, in the updates of sft alone.",
        ge=0,
        lt=1,
        used_by="model.lora_rank>0",
        unused=0.0,
    )
    vocab_size: int | None = key(
        "Tokens of the BPE that is learned.", ge=260, used_by="model.path=null", needed=True
    )
    hidden_size: int | None = key(
        "Width; doubling costs four times the time.", ge=8, used_by="model.path=null", needed=True
    )
    layers: int | None = key("Decoder blocks.", ge=1, used_by="model.path=null", needed=True)
    heads: int | None = key(
        "Attention heads; must divide hidden_size.", ge=1, used_by="model.path=null", needed=True
    )
    context: int | None = key(
        "Longest sequence in tokens.", ge=8, used_by="model.path=null", needed=True
    )


# --------------------------------------------------------------------------- data


@dataclass
class Data:
    """Where rows come from, how they become tokens, and what is held out."""

    format: str = key(
        "How rows are stored: the shipped demo, rows in our columns, or a published shape.",
        choices=(
            *("demo", "rows", "alpaca", "gsm8k", "gsm8k_solutions", "helpsteer", "hh", "kto"),
            *("messages", "prm800k", "sharegpt", "stack_exchange", "text", "tldr"),
            *("ultrafeedback", "verl"),
        ),
    )
    path: Any = key(
        "File, folder, pattern as 'data/*.jsonl', a list of those, or a hub dataset as "
        "owner/name@revision:config:split; generate also takes - (stdin).",
        texts=True,
    )
    sources: list[Any] = key(
        "Several sources in place of path: {path, and any of shape, columns, cap (rows), repeat "
        "(times in an epoch), weight (share of an epoch), name}."
    )
    eval_path: Any = key(
        "Held-out rows, as path; null takes the validation or test split in the folder that path "
        "is, or else holds out prompts of path.",
        texts=True,
    )
    eval_share: float = key(
        "Share of prompts that are held out, with all their rows, by the hash of the prompt: rows "
        "that come later move none of them.",
        gt=0,
        lt=1,
    )
    eval_rows: int | None = key(
        "Number of prompts to hold out in place of a share: those whose hash is lowest.", ge=1
    )
    max_rows: int | None = key("Use the first rows only; null uses all.", ge=1)
    text_path: Any = key(
        "Plain text rows for the pretraining mix (ptx_coef, text_mix), as path.", texts=True
    )
    columns: dict[str, str] = key("Your columns for ours, as {ours: yours}, or paths into them.")
    template: str | None = key(
        "How a prompt is written: text with {prompt} and other {columns} in it (\\n breaks a "
        "line), or chat (the chat template); null does as the policy's stage.json says, or else "
        "writes text as it is and messages by the chat template."
    )
    prefix: str | None = key(
        "File of text that stands before every prompt, in dialogues as the system message: what "
        "generate samples under, and what sft algo=distill learns to do without."
    )
    chat_template: str | None = key(
        "A Jinja file, or chatml, gemma, llama3, mistral, qwen or zephyr; null is the tokenizer's."
    )
    chat_args: dict[str, Any] = key(
        "What the chat template is told beside the messages, as {enable_thinking: false}; {} is "
        "what the policy's stage.json says."
    )
    loss_on: str = key(
        "Which replies of a dialogue sft learns from: all of the assistant's, or the last.",
        choices=("all", "last"),
    )
    special_tokens: str = key(
        "Special tokens that rows spell: read as the text that they are, or kept as tokens.",
        choices=("text", "keep"),
    )
    max_prompt_tokens: int | None = key(
        "Longest prompt in tokens; null is the policy's, else what the model's positions leave.",
        ge=1,
    )
    max_response_tokens: int | None = key(
        "Longest response in tokens, trained on or sampled; null is the policy's, else what the "
        "model's positions leave.",
        ge=1,
    )
    long_responses: str | None = key(
        "Responses over the limit: cut them (their end is lost), drop the row, or stop; null cuts, "
        "but stops where more than 5 % are cut.",
        choices=("cut", "drop", "error"),
    )
    long_prompts: str = key(
        "Prompts over the limit: stop, drop the row, or cut their start.",
        choices=("error", "drop", "cut"),
    )
    bad_rows: str = key(
        "Rows that are unreadable, empty or misshapen: stop at the first, or drop and count them.",
        choices=("error", "drop"),
    )
    convert: list[str] = key(
        "Feedback may be turned into other kinds, in this order; nothing is turned unasked.",
        choices=(
            "feedback_to_ranking",
            "feedback_to_stepwise",
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
    step_end: str = key("Regular expression whose matches end a step of a response.", regex=True)
    streaming: bool = key(
        "Read rows while the run goes on and keep no tokens on disk; needs algo.max_steps (sft, "
        "reward, dpo)."
    )
    cache: str | None = key(
        "Folder of tokenised rows, read again by runs with the same files, tokenizer and template; "
        "null is that of RLHF_CLI_CACHE, or the user's own."
    )
    gold: str | None = key("Scorer that training never sees; evaluate reports it.", regex=True)


# --------------------------------------------------------------------------- algo


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


@dataclass
class LabelAlgo(Decoding):
    """What is asked of whoever labels, and of whom."""

    prompts: int | None = key("Use the first prompts only; null uses all.", ge=1)
    protocol: str = key(
        "What is asked of a task: rank all responses, ties allowed; which of a pair is better, and "
        "by how much; thumbs up or down for one response.",
        choices=("rank", "pair", "thumbs"),
    )
    responses: int = key(
        "Responses in a task of rank; those of a pair are 2, of thumbs 1.", ge=2, le=9
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


# --------------------------------------------------------------------------- stages
# config/stages.py has what else is known of each.


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

    algo: GenerateAlgo


@dataclass
class LabelConfig(SamplingConfig):
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
    reward: str | None = key(
        "What scores responses, as in ppo: source=reward labels by it, and with other sources the "
        "report tells how far they agree with it.",
        role="reward",
    )
    source: str = key(
        "Who labels: people on a local web page or in this terminal; the reward, or what "
        "samples=FILE says of it; or labels=FILE.",
        choices=("page", "terminal", "reward", "file"),
    )
    annotators: list[str] = key("Names of those who label; tasks are dealt out to them.")
    who: str | None = key(
        "Which of them sits at the terminal; null is the first.", used_by="source=terminal"
    )
    port: int = key(
        "Port of the page on this machine; 0 takes a free one.",
        ge=0,
        le=65535,
        used_by="source=page",
        unused=0,
    )
    labels: str | None = key(
        "File of labels that were made elsewhere, of the tasks in tasks.jsonl: rows of task, "
        "annotator and ranks, strength, label, skip or flag.",
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
    accept_partial: bool = key("Seal what is labelled where tasks are left.")
    algo: LabelAlgo


@dataclass
class EvaluateConfig(SamplingConfig):
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
    judge: str | None = key(
        "Language model that judges pairs: a policy folder or hub id, or the address of an "
        "endpoint with the chat route of OpenAI, as https://host/v1; its key is JUDGE_API_KEY or "
        "OPENAI_API_KEY of the environment; null asks none.",
        role="policy",
    )
    judge_model: str | None = key("Name of the model at that endpoint.", used_by="judge")
    judge_prompt: str | None = key(
        "File with the question, with {prompt}, {first} and {second} in it; null is ours.",
        used_by="judge",
    )
    judge_tie: float = key(
        "Mean log-odds of both orders nearer to 0 than this are a tie.",
        ge=0,
        used_by="judge",
        unused=0.5,
    )
    judge_tokens: int = key(
        "Tokens that an endpoint may answer in: 1 reads the log-probs of A and B; with more it may "
        "reason, and its last [[A]], [[B]] or [[C]] counts.",
        ge=1,
        used_by="judge",
        unused=1,
    )
    judge_concurrency: int = key(
        "Requests to an endpoint at once.", ge=1, used_by="judge", unused=8
    )
    judge_timeout: float = key(
        "Seconds for a request with all that it is tried again.",
        gt=0,
        used_by="judge",
        unused=120.0,
    )
    judge_prices: list[float] = key(
        "Prices of a million tokens read and a million written, for the cost in the report; [] "
        "tells none.",
        ge=0,
        used_by="judge",
        unused=[],
    )
    judge_max_cost: float | None = key(
        "Cost by judge_prices at which a run asks an endpoint no more and ends, its verdicts kept; "
        "the calls under way then are still paid. Each start counts from 0. null sets no limit.",
        gt=0,
        used_by="judge",
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
