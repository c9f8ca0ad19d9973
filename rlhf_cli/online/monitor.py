"""What is seen of a run that learns from its own samples."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from rlhf_cli.config.errors import RunError
from rlhf_cli.config.schema.stages import OnlineConfig
from rlhf_cli.data.items import EncodedPrompt
from rlhf_cli.data.order import derived_seed
from rlhf_cli.evaluation.samples import show_samples
from rlhf_cli.evaluation.token_values import TokenLines
from rlhf_cli.objectives.estimates import clustered_stderr
from rlhf_cli.online.alarms import Alarms
from rlhf_cli.online.experience import Experience, measure
from rlhf_cli.online.roles import Roles
from rlhf_cli.online.updates import Trajectory
from rlhf_cli.online.written import WrittenWeights
from rlhf_cli.reporting.console import say
from rlhf_cli.reporting.metrics import Clock
from rlhf_cli.rollout.rollouts import Rollout
from rlhf_cli.rollout.sampling import Sampling
from rlhf_cli.runs.session import Session
from rlhf_cli.training.loss_term import Metrics

WRITTEN = ("reward", "kl", "entropy", "length", "ended")  # what stage.json says of the weights


def prompts_to_monitor(
    cfg: OnlineConfig, session: Session, roles: Roles, held_out: Sequence[EncodedPrompt]
) -> list[EncodedPrompt]:
    """The held-out prompts that evaluations sample from; none without evaluations.

    Raises:
        UserError: a row lacks what the reward or gold reads.
    """
    if cfg.algo.eval_every is None:
        return []
    prompts = list(held_out[: cfg.algo.eval_prompts])
    rows = [row for row, _ in prompts]
    roles.reward.check(rows, session.require)
    if roles.gold is not None:
        roles.gold.check(rows, session.require, "gold")
    return prompts


def in_short(metrics: Metrics) -> str:
    """An iteration in a few words."""
    kl = f"  KL {metrics['kl']:.2f}" if "kl" in metrics else ""
    return f"reward {metrics['reward']:.3f}{kl}"


def mean_and_error(name: str, values: Tensor, rollouts: Sequence[Rollout]) -> Metrics:
    """The mean of the values that are numbers and, as NAME_stderr, its error clustered by prompt.

    Args:
        values: (B,), one of each rollout.
    """
    known = ~values.isnan()
    prompts = [
        str(rollout.row.prompt)
        for rollout, kept in zip(rollouts, known.tolist(), strict=True)
        if kept
    ]
    error = clustered_stderr(values[known], prompts)
    return {name: values.nanmean().item(), f"{name}_stderr": error}


class Monitor:
    """Logs, tables of samples, evaluations on held-out prompts, alarms, and the weights to write.

    metrics: of the last step.
    """

    def __init__(
        self,
        cfg: OnlineConfig,
        session: Session,
        roles: Roles,
        held_out: list[EncodedPrompt],
        state: dict[str, Any],
        tensors: dict[str, Tensor],
    ) -> None:
        """Starts the logs, so `out` must be this run's own.

        Args:
            held_out: from `prompts_to_monitor`.
            state, tensors: what the methods of those names returned at the resume point.
        """
        self._cfg, self._session = cfg, session
        self._roles, self._held_out = roles, held_out
        self.metrics: Metrics = state.get("metrics", {})
        self._alarms = Alarms(cfg.algo, state)
        self.written = WrittenWeights(roles.policy.model, cfg.algo, state, tensors)
        self._log, self._samples = session.log(), session.log("samples.jsonl")
        self._tokens = TokenLines(roles.policy.tokenizer)
        self._stopped: dict[str, Any] = {}

    def state(self) -> dict[str, Any]:
        """Figures for a resume point."""
        return {"metrics": self.metrics, **self._alarms.state(), **self.written.state()}

    def tensors(self) -> dict[str, Tensor]:
        """Weights for a resume point."""
        return self.written.tensors()

    def before_updates(self, step: int, metrics: Metrics) -> bool:
        """Look at what the rollouts of a step show; True where nothing is learnt from them.

        A step that breaks a limit which ends the run is not kept as the best, unless the limit is
        that the reward is high enough.
        """
        if step == 1 and metrics["ended"] == 0:
            say(
                "note: no response came to an end within "
                f"{self._cfg.algo.max_tokens} tokens; see algo.missing_eos_reward and max_tokens"
            )
        if step == 1 and metrics["reward_std"] == 0:
            say("note: all rewards of the first iteration are the same; nothing tells them apart")
        stops = self._alarms.on_rollouts(step, metrics)
        if stops:
            self._stopped = {"step": step, "alarms": stops}
        if not set(stops) - {"reward"}:
            self.written.offer(step, metrics)
        return bool(stops)

    def end_of_step(
        self,
        step: int,
        experience: Experience,
        items: Sequence[Trajectory],
        metrics: Metrics,
        clock: Clock,
        stop: bool,
    ) -> bool:
        """Evaluate where it is time to, log and show; True where the run ends here.

        Args:
            items: what was learnt from in this step.
        """
        algo, cost = self._cfg.algo, self._session.cost(items)
        last = stop or step == algo.steps
        if algo.eval_every and (last or step % algo.eval_every == 0):
            seen = self.evaluate()
            if self._alarms.on_evaluation(step, seen):
                stop = self._stop(step, "overoptimised")
            metrics = metrics | seen
            if algo.keep in seen and not set(self._stopped.get("alarms", [])) - {"reward"}:
                self.written.offer(step, metrics)
            clock.lap("evaluation")
        if self._alarms.on_updates(step, metrics):
            stop = self._stop(step, "sampling_gap")
        self.metrics = metrics
        self._log.write(step, metrics | clock.seconds | cost)
        policy = self._roles.policy
        self._session.snapshot(step, policy.model, policy.encoder, self.written.in_place)
        if last or stop or step == 1 or step % algo.show_every == 0:
            charged = metrics["kl_coef"] if algo.kl_in == "reward" else 0.0
            tokens = self._tokens.of(experience.rollouts, experience.of_tokens(items, charged))
            show_samples(step, *experience.shown(), tokens, self._samples)
        return stop

    def _stop(self, step: int, alarm: str) -> bool:
        """Note that an alarm, perhaps one more, ends the run."""
        others = self._stopped.get("alarms", [])
        self._stopped = {"step": step, "alarms": [*others, alarm]}
        return True

    def evaluate(self) -> Metrics:
        """eval/reward, /gold, /kl, /length of the weights that would be written now.

        The reward is that of training, unscaled; gold is its judge's own score. The noise of
        sampling is the same in every evaluation, so that they differ by the weights.
        """
        cfg, policy = self._cfg, self._roles.policy
        sampling = Sampling(cfg.algo.sampled_tokens, cfg.algo.temperature)
        seed = derived_seed(cfg.seed, "evaluation")
        with self.written.in_place():
            policy.engine.update(policy.model)
            rollouts = policy.engine.sample(self._held_out, sampling, seed=seed)
            experience = measure(rollouts, self._roles, cfg, cfg.algo.temperature)
        assert experience.kls is not None
        lengths = [len(rollout.tokens.response) for rollout in rollouts]
        metrics = {
            **mean_and_error("eval/reward", experience.rewards.total, rollouts),
            "eval/kl": experience.kls.mean().item(),
            "eval/length": sum(lengths) / len(lengths),
        }
        if self._roles.gold is not None:
            metrics |= mean_and_error("eval/gold", self._roles.gold.score(rollouts).total, rollouts)
        return metrics

    def ending(self) -> dict[str, Any]:
        """What stage.json says of a run that an alarm ended: its step, and which."""
        return {"stopped": self._stopped} if self._stopped else {}

    def finish(self, prompts: Sequence[EncodedPrompt], names: tuple[str, ...] = ()) -> Metrics:
        """Put the weights that are written into the policy, and measure them.

        Args:
            prompts: of training, one response to each.
            names: metrics of the step that the weights are of, which are returned too.

        Returns:
            reward (of training, unscaled), kl, entropy, length and ended of the written weights.

        Raises:
            RunError: the best evaluation is to be written, and none scored anything.
        """
        cfg, policy = self._cfg, self._roles.policy
        if cfg.algo.keep.startswith("eval/") and not self.written.kept:
            raise RunError(
                f"algo.keep={cfg.algo.keep}: no response of any evaluation got a score, so that "
                "none is the best; see the messages above"
            )
        self.written.put()
        self._session.settle(policy.model)
        sampling, seed = Sampling(cfg.algo.sampled_tokens, cfg.algo.temperature), cfg.seed
        policy.engine.update(policy.model)
        rollouts = policy.engine.sample(prompts, sampling, seed=derived_seed(seed, "written"))
        experience = measure(rollouts, self._roles, cfg, cfg.algo.temperature)
        measured = experience.metrics(0.0)
        errors = mean_and_error("reward", experience.rewards.total, rollouts)
        if experience.kls is not None:
            errors |= mean_and_error("kl", experience.kls, rollouts)
        metrics = self.written.kept or self.metrics
        kept = ("kept_step", *names, *(name for name in metrics if name.startswith("eval/")))
        return {
            **{name: measured[name] for name in WRITTEN},
            **{name: value for name, value in errors.items() if name.endswith("_stderr")},
            **{name: metrics[name] for name in kept if name in metrics},
        }
