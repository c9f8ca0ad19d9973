"""The words of the smallest runs: every stage in seconds, every key that matters given."""

DATA = [
    *("data=jsonl", "data.path=rows.jsonl", "data.eval_rows=8", "data.text_path=text.jsonl"),
    *("data.max_prompt_tokens=24", "data.max_response_tokens=8", "hardware.threads=1"),
]
ADAM = ["algo.lr=5e-3", "algo.warmup_steps=1", "algo.max_grad_norm=1.0", "algo.adam_eps=1e-5"]
ROLLOUTS = [
    *("algo.steps=6", "algo.batch_size=8", "algo.minibatch_size=4", "algo.epochs=2"),
    *("algo.show_every=3", "algo.kl_coef=0.05", "algo.clip=0.2", "algo.temperature=0.9"),
]
WORDS = {
    "sft": [
        *("model.vocab_size=280", "model.hidden_size=16", "model.layers=1", "model.heads=2"),
        *("model.context=64", "model.dropout=0.1", "algo.text_mix=0.5", "algo.batch_size=8"),
        *("algo.epochs=2", "algo.max_steps=6", "algo.eval_every=2", "algo.keep=best"),
    ],
    "reward": ["algo.batch_size=8", "algo.epochs=2", "algo.eval_every=2"],
    "dpo": ["algo.batch_size=8", "algo.epochs=2", "algo.eval_every=2", "algo.beta=0.3"],
    "ppo": [
        *ROLLOUTS,
        *("algo.ptx_coef=0.5", "algo.ptx_batch_size=4", "algo.value_lr=1e-2"),
        *("algo.kl_controller=ziegler", "algo.kl_target=0.5", "algo.kl_horizon=100"),
        *("algo.entropy_coef=0.01", "algo.missing_eos_reward=-1.0"),
    ],
    "grpo": [*ROLLOUTS, "algo.group_size=3", "reward=regex:a"],
    "lora": ["model=lora", "model.lora_rank=2", "model.merge_lora=false"],
}


def words_of(stage: str) -> list[str]:
    """A stage's words, its resume points every two steps."""
    return [*DATA, *ADAM, *WORDS[stage], "hardware.save_every=2"]
