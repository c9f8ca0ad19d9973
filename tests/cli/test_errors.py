"""What a user can get wrong, and the one line that answers it.

Each case runs the command line, some of them the console script in a process of its own: status 2,
one line on stderr with the given parts, nothing on stdout, nothing written.
"""

import subprocess
from pathlib import Path

import pytest

from tests.cli.made import cpu_seconds
from tests.conftest import Cli

SECONDS = 2.0  # of processor time, for an answer that needs no model

# (the words after rlhf-cli, parts of the answer)
NAMES = [
    ("ppoo", ["unknown stage ppoo", "did you mean ppo?", "evaluate"]),
    ("xyzzy", ["unknown stage xyzzy", "choices: sft, reward"]),
    ("algo=ppo", ["the stage comes first", "rlhf-cli STAGE algo=ppo"]),
    ("--chek", ["the stage comes first"]),
    ("ppo algo.kl_coeff=0.1", ["unknown key algo.kl_coeff", "did you mean algo.kl_coef?"]),
    ("ppo alg.kl_coef=0.1", ["unknown key alg.kl_coef", "did you mean algo.kl_coef?"]),
    ("ppo algo.zzz=1", ["unknown key algo.zzz", "algo has adam_beta1", "whiten_rewards"]),
    ("ppo kl_coef=0.1", ["unknown key kl_coef", "did you mean algo.kl_coef?"]),
    ("ppo dtype=float32", ["did you mean model.dtype?"]),
    ("ppo algos=ppo", ["unknown key algos", "did you mean algo?"]),
    ("ppo polcy=x", ["unknown key polcy", "did you mean policy?"]),
    ("ppo algo.beta=0.1", ["unknown key algo.beta", "belongs to `rlhf-cli dpo`"]),
    ("sft policy=x", ["unknown key policy", "belongs to `rlhf-cli reward`"]),
    ("reward data.convert=feedback_to_stepwise", ["data.convert must be a list, in brackets"]),
    ("sft model=me/it", ["a folder or hub id is model=pretrained model.path=me/it; sft takes"]),
    ("dpo model=me/it", ["a folder or hub id is policy=me/it; dpo takes full, lora"]),
    ("sft model=lora", ["did you mean pretrained_lora?"]),
    ("sft model.path=.", ["is not used by model.path=.", "as model=pretrained does"]),
    ("sft model=qwen3 model.lora_targets=x", ["or set model.lora_rank above 0"]),
    ("sft model.adapter=stack", ["but model.lora_rank=0; set it to 16"]),
    ("sft model.path=./nowhere model=qwen3", ["does not exist; give a folder or hub id of a"]),
    # names of before
    ("ppo hardware.keep=1", ["hardware.keep is called hardware.keep_checkpoints now"]),
    ("ppo algo.refills=2", ["dynamic_sampling now, and belongs to `rlhf-cli grpo`"]),
    ("sft algo=steps", ["algo=steps is called algo=process now, and belongs to `rlhf-cli reward`"]),
    ("grpo algo.refills=2", ["algo.refills is called algo.dynamic_sampling now"]),
    ("grpo +algo.refills=2", ["algo.refills is called algo.dynamic_sampling now"]),
    ("grpo -m algo.refills=0,2", ["algo.refills is called algo.dynamic_sampling now"]),
    ("reward algo=steps", ["algo=steps is called algo=process now"]),
    ("reward algo.loss=steps", ["algo.loss=steps is called algo.loss=process now"]),
    (
        "reward data.convert=[feedback_to_steps]",
        ["data.convert=feedback_to_steps is called data.convert=feedback_to_stepwise now"],
    ),
    ("dpo algo.loss=steps", ["algo.loss must be dpo|hinge|", "got steps"]),
    ("ppo +algo.kl_coeff=1", ["unknown key algo.kl_coeff", "did you mean algo.kl_coef?"]),
    ("ppo ++algo.kl_coeff=1", ["unknown key algo.kl_coeff", "did you mean algo.kl_coef?"]),
    ("ppo +algo.kl_coef=1", ["algo.kl_coef exists already", "without +"]),
    ("ppo ~algo.kl_coef", ["~algo.kl_coef", "cannot be removed"]),
    ("ppo algo=ppoo", ["unknown algo option ppoo", "did you mean ppo?", "ppo, ppo_adaptive"]),
    ("ppo algo=1e+5", ["Config group override must be a string or a list"]),
    ("ppo algo=", ["unknown algo option", "ppo takes a2c"]),
    ("ppo algo=dpo", ["algo=dpo belongs to `rlhf-cli dpo`; ppo takes a2c"]),
    ("dpo algo=kwise", ["algo=kwise belongs to `rlhf-cli reward`", "kto", "unlikelihood"]),
    ("reward algo=kto", ["algo=kto belongs to `rlhf-cli dpo`", "kwise", "token"]),
    ("ppo model=tiny", ["model=tiny belongs to `rlhf-cli sft`", "ppo takes full, lora"]),
    ("generate model=full", ["model=full belongs to", "generate takes frozen"]),
    ("ppo -m algo=ppo,dpo", ["algo=dpo belongs to `rlhf-cli dpo`"]),
    ("ls algoo", ["unknown group algoo", "did you mean algo?"]),
    ("cp algo/pppo x", ["nothing is named algo/pppo", "did you mean algo/ppo?"]),
    ("cp algo/ppo", ["cp takes two words"]),
    ("completion tcsh", ["bash, zsh or fish"]),
    ("env please", ["env takes no words"]),
]

GRAMMAR = [
    ("ppo --algo.kl_coef=0.1", ["no dashes", "algo.kl_coef=0.1"]),
    ("ppo --algo.kl_coef 0.1", ["no dashes", "algo.kl_coef=VALUE"]),
    ("ppo --chek", ["unknown flag --chek", "did you mean --check?"]),
    ("ppo --config-name x", ["unknown flag --config-name"]),
    ("ppo --config-dir nowhere", ["--config-dir", "no folder nowhere"]),
    (f"ppo --config-dir {'x' * 300}", ["--config-dir", "no folder xxx"]),
    ("ppo --cfg jbo", ["--cfg", "jbo"]),
    ("ppo --cfg job -p algos", ["--package takes algo", "algos"]),
    ("ppo --cfg job -m", ["take one"]),
    ("ppo --resolve", ["--resolve", "--cfg job"]),
    ("ppo algo.kl_coef 0.1", ["algo.kl_coef has no value", "algo.kl_coef=VALUE"]),
    ("ppo =0.1", ["names no key"]),
    ("ppo algo.lr=a=b", ["cannot read algo.lr=a=b", "'algo.lr=\"a=b\"'"]),
    ("ppo out=[a", ["cannot read out=[a", "'out=\"[a\"'"]),
    ("ppo name=a,b", ["name=a,b", "-m", "'name=\"a,b\"'"]),
    ("ppo name=${nam}", ["name", "${nam}"]),
]

VALUES = [
    (f"ppo algo.steps={'9' * 400}", ["algo.steps must be below 2^53"]),
    (f"ppo algo.lr={'9' * 400}", ["algo.lr"]),
    (f"sft out={'x' * 300}", ["out=xxx", "cannot be a path: it is too long"]),
    (f"ppo policy={'x/' * 2100}", ["cannot be a path: it is too long"]),
    (f"ppo algo={'x' * 300}", ["unknown algo option xxx"]),
    ("ppo algo.kl_coef=abc", ["algo.kl_coef must be a number >= 0", "abc"]),
    ("ppo algo.epochs=2.5", ["algo.epochs must be an integer >= 1", "2.5"]),
    ("ppo algo.whiten_rewards=maybe", ["algo.whiten_rewards must be none|scale|whiten", "maybe"]),
    ("ppo algo.gamma=null", ["algo.gamma must be a number > 0", "null"]),
    ("ppo data.columns=3", ["data.columns must be a map"]),
    ("ppo algo.lam=1.5", ["algo.lam must be a number >= 0, <= 1", "1.5"]),
    ("ppo algo.clip=0", ["algo.clip must be a number > 0", "0"]),
    ("ppo seed=-1", ["seed must be an integer >= 0", "-1"]),
    ("dpo algo.label_smoothing=0.5", ["algo.label_smoothing", "< 0.5"]),
    ("dpo algo.loss=ktoo", ["algo.loss must be", "did you mean kto?"]),
    ("reward algo.centring=-1", ["algo.centring must be a number >= 0", "-1"]),
    ("dpo data.convert=[ranking_to_pairs]", ["data.convert", "did you mean ranking_to_"]),
    ("dpo data.doubtful_pairs=maybe", ["data.doubtful_pairs must be keep|drop|error", "maybe"]),
    ("ppo algo.lr=nan", ["algo.lr must be finite", "nan"]),
    ("ppo algo.lr=inf", ["algo.lr must be finite", "inf"]),
    ("ppo algo.lr_schedule=cosin", ["algo.lr_schedule", "did you mean cosine?"]),
    ("grpo algo.group_size=0", ["algo.group_size must be an integer >= 1", "0"]),
    ("ppo data=jsonl", ["data=rows needs data.path=FILE"]),
    ("ppo -m algo.kl_coef=0.1,abc", ["algo.kl_coef must be a number >= 0", "abc"]),
    ("ppo -m algo=glob(ppo*)", ["algo=glob(ppo*)", "algo=A,B"]),
    ("ppo -m algo.kl_coef=interval(0,1)", ["INTERVAL"]),
    ("ppo -m algo.clip=0.1,0", ["algo.clip must be a number > 0"]),
]

RULES = [
    ("ppo algo.batch_size=64 algo.minibatch_size=24", ["minibatch_size=24 must divide", "=64"]),
    ("grpo algo.batch_size=16 algo.minibatch_size=3", ["minibatch_size=3 must divide", "=16"]),
    (
        "ppo algo.kl_target=6",
        ["algo.kl_target is not used by algo.kl_controller=fixed", "null", "algo=ppo_adaptive"],
    ),
    (
        "ppo algo.kl_horizon=100",
        ["algo.kl_horizon is not used by algo.kl_controller=fixed", "algo=ppo_ad"],
    ),
    ("ppo algo.kl_controller=ziegler", ["kl_controller=ziegler needs algo.kl_target"]),
    ("ppo algo=ppo_adaptive algo.kl_horizon=null", ["ziegler needs algo.kl_horizon"]),
    (
        "ppo algo=ppo_adaptive algo.kl_controller=schulman",
        ["algo.kl_horizon is not used by algo.kl_controller=schulman", "to null"],
    ),
    (
        "sft model.vocab_size=null",
        ["model.path=null needs model.vocab_size", "model=tiny brings a value"],
    ),
    (
        "sft model.path=gpt2",
        ["model.vocab_size is not used by model.path=gpt2", "model=pretrained"],
    ),
    ("sft model.hidden_size=100 model.heads=3", ["model.heads=3 must divide", "100"]),
    (
        "sft model.router_aux_coef=0.1",
        ["model from scratch has no routers", "router_aux_coef=null"],
    ),
    ("sft model.context=40", ["model.context=40 is shorter than", "max_prompt_tokens"]),
    ("ppo model.merge_lora=false", ["model.merge_lora=false", "lora_rank=0"]),
    (
        "ppo data=jsonl data.path=x.jsonl algo=ppo_ptx",
        ["algo.ptx_coef=", "needs plain text", "data.text_path"],
    ),
    (
        "sft data=jsonl data.path=x.jsonl model=pretrained algo.text_mix=0.5",
        ["algo.text_mix=0.5 needs plain text", "data.text_path"],
    ),
    (
        "ppo algo.min_lr_ratio=0.1",
        ["min_lr_ratio is not used by algo.lr_schedule=linear", "=cosine"],
    ),
    ("generate hardware.save_every=10", ["hardware.save_every", "stages that train"]),
    ("evaluate hardware.gradient_checkpointing=true", ["gradient_checkpointing", "that train"]),
    ("generate algo.min_tokens=50 algo.max_tokens=20", ["min_tokens=50 exceeds", "=20"]),
    ("generate algo.beams=4 algo.temperature=0.7", ["beams=4", "temperature must be 1"]),
    ("generate algo.beams=4 algo.top_k=5", ["beams=4", "top_k must be 0"]),
    ("generate algo.beams=4 algo.top_p=0.9", ["beams=4", "top_p must be 1"]),
    (
        "generate algo.length_penalty=2",
        ["length_penalty is not used by algo.beams=1", "to 1", "above"],
    ),
    (
        "evaluate samples=a.jsonl algo.samples=8",
        ["algo.samples=8 is of sampling, but samples=a.jsonl has all responses; leave it at 4"],
    ),
    (
        "label samples=a.jsonl algo.temperature=0.5",
        ["algo.temperature=0.5 is of sampling", "leave it at 1.0"],
    ),
    ("evaluate samples=a.jsonl baselines=[x]", ["baselines are sampled from"]),
    ("generate algo.beams=4 algo.samples=5", ["samples=5 exceeds algo.beams=4"]),
    ("ppo data.template=Hello", ["data.template", "{prompt}"]),
    ('reward data.step_end="["', ["data.step_end='[' is not a regular expression"]),
    # keys that some losses read and others do not
    ("reward algo=kwise algo.centring=0.1", ["centring is not used by algo.loss=kwise", "null"]),
    ("reward algo=process algo.row_margin=true", ["row_margin is not used by algo.loss=process"]),
    ("reward algo.target=label", ["algo.target is not used by algo.loss=bradley_terry"]),
    ("reward algo.label_smoothing=null", ["loss=bradley_terry needs algo.label_smoothing"]),
    ("reward algo=pointwise algo.target=null", ["pointwise needs algo.target; algo=pointwise"]),
    (
        "reward algo.loss=process",
        ["algo.loss=process needs algo.aggregate; algo=process brings a value"],
    ),
    ("reward algo=process algo.aggregate=mean", ["aggregate=mean does not fit", "product or min"]),
    ("reward algo=token algo.aggregate=min", ["aggregate=min does not fit", "mean or sum"]),
    ("dpo algo=ipo algo.beta=0.1", ["algo.beta is not used by algo.loss=ipo", "algo=ipo"]),
    ("dpo algo=kto algo.label_smoothing=0.1", ["label_smoothing is not used by algo.loss=kto"]),
    ("dpo algo.loss=simpo", ["algo.loss=simpo needs algo.gamma; algo=simpo brings a value"]),
    ("dpo algo=orpo algo.lam=null", ["algo.loss=orpo needs algo.lam"]),
    ("dpo algo.desirable_weight=2", ["algo.desirable_weight is not used by algo.loss=dpo"]),
    ("dpo algo=kto algo.undesirable_weight=2", ["undesirable_weight are given together or not"]),
    # references
    ("dpo algo=orpo algo.precompute_reference=true", ["algo.loss=orpo has no reference"]),
    ("dpo algo=simpo reference=x", ["reference=x is not used by algo.loss=simpo", "null"]),
    (
        "dpo algo.bootstrap_epochs=2",
        ["bootstrap_epochs is not used by reference=null", "=bootstrap"],
    ),
    (
        "dpo reference=x algo.bootstrap_lr=1e-4",
        ["bootstrap_lr is not used by reference=x", "=bootstrap"],
    ),
    # the reward that chooses sft's weights
    ("sft select_by=reward", ["select_by=reward needs reward=VALUE: What scores responses"]),
    ("sft reward=regex:a", ["reward is not used by select_by=loss", "set select_by=reward"]),
    ("sft select_by=reward reward=regex:a algo.keep=last", ["the best weights", "keep=last"]),
]


ALL = NAMES + GRAMMAR + VALUES + RULES


def check(done: "subprocess.CompletedProcess[str]", parts: list[str], folder: Path) -> None:
    """One line with these parts, and nothing made."""
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("rlhf-cli: error: ")
    assert done.stderr.count("\n") == 1, done.stderr
    for part in parts:
        assert part in done.stderr
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(("words", "parts"), ALL)
def test_a_user_error_is_one_line(words: str, parts: list[str], here: Cli, tmp_path: Path) -> None:
    check(here(*words.split()), parts, tmp_path)


@pytest.mark.parametrize(("words", "parts"), ALL[::20])
def test_a_user_error_is_told_in_time(
    words: str, parts: list[str], cli: Cli, tmp_path: Path
) -> None:
    before = cpu_seconds()
    done = cli(*words.split())
    assert cpu_seconds() - before < SECONDS
    check(done, parts, tmp_path)
