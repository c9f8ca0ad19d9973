"""Labelling: what people, a reward or a file say of the responses of policies, as rows.

InstructGPT's second step (2203.02155): K responses to a prompt, of one policy or several, are
ranked with ties, compared in pairs with how much better one is, or get thumbs up or down. Whoever
labels is not told who wrote what, and sees responses in an order of their own.

First responses are sampled, once, into tasks.jsonl; or samples=FILE has them. Then labels are
collected, each on disk before the next task is shown, in events-NAME.jsonl. Once all tasks are
labelled the folder is sealed with rows that reward and dpo read as they are, and with a report:
agreement, Krippendorff's alpha, ratings of the policies. Until tasks are sampled torch is needed,
then not before the end.

    rlhf-cli label policy=runs/demo/sft baselines=[runs/demo/ppo] algo.protocol=pair
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_cli.config.errors import RunError, UserError
from rlhf_cli.config.schema.stages import LabelConfig
from rlhf_cli.data.kinds import Prompt
from rlhf_cli.data.order import derived_seed
from rlhf_cli.data.rows import Split
from rlhf_cli.folders.manifest import text_hash
from rlhf_cli.labelling import terminal
from rlhf_cli.labelling.automatic import label_by_file, label_by_reward
from rlhf_cli.labelling.desk import Desk, Terms
from rlhf_cli.labelling.rows import counted, rows_of
from rlhf_cli.labelling.tasks import (
    Sample,
    dealt,
    read_tasks,
    samples_of_file,
    tasks_of,
    write_tasks,
)
from rlhf_cli.reporting.console import Bar, say, table
from rlhf_cli.reporting.metrics import round_figures
from rlhf_cli.runs import interrupts
from rlhf_cli.runs.lock import check_lock
from rlhf_cli.runs.out_folder import FINISHED, FREE, SAMPLES, TASKS, check_no_labels, claim, staging
from rlhf_cli.runs.preflight import Plan, preflight

if TYPE_CHECKING:
    from rlhf_cli.runs.session import Session

REPORT = "report.json"


def run(cfg: LabelConfig, plan: Plan | None = None) -> Path:
    """Sample tasks, collect labels, seal them as rows with a report; returns `out`.

    Raises:
        RunError: tasks are left that nobody has labelled; the same command goes on.
    """
    if plan is None or (plan.provenance is None and plan.state != FINISHED):
        plan = preflight(cfg)
    if plan.state != FINISHED and not sampled_before(cfg, plan):
        sample_tasks(cfg, plan)
    if plan.state != FINISHED:
        desks = collected(cfg)
        left = sum(desk.left for desk in desks.values())
        if left and not cfg.accept_partial:
            raise RunError(left_over(cfg, desks))
    return sealed(cfg, plan)


def sampled_before(cfg: LabelConfig, plan: Plan) -> bool:
    """Whether the tasks are there; the folder is this run's own then.

    Raises:
        UserError: labels of people would be lost.
    """
    out = Path(cfg.out)
    if plan.state == FREE:
        check_no_labels(out)
    if plan.state == FREE or not (out / TASKS).is_file():
        return False
    assert plan.provenance is not None  # a finished or checked run does not come here
    claim(cfg, plan.provenance)
    return True


def left_over(cfg: LabelConfig, desks: dict[str, Desk]) -> str:
    """What is to be done still, in a line."""
    done = sum(len(desk.turns) - desk.left for desk in desks.values())
    whole = sum(len(desk.turns) for desk in desks.values())
    others = [name for name, desk in desks.items() if desk.left]
    who = "" if len(desks) == 1 or cfg.source == "file" else f"; who={others[0]} is next"
    return (
        f"{cfg.out}: {done} of {whole} labels are kept; the same command goes on{who}, "
        "accept_partial=true seals what is there"
    )


# --------------------------------------------------------------------------- tasks


def sample_tasks(cfg: LabelConfig, plan: Plan) -> None:
    """Write tasks.jsonl: what the policies respond, or what samples=FILE has."""
    from rlhf_cli.runs.session import begin

    session = begin(cfg, plan)
    assert session is not None  # it is not finished
    session.trackers = None  # they are told by the session that seals: it has the figures
    samples = given_samples(session) if cfg.samples else sampled(session)
    most = cfg.algo.responses if cfg.algo.protocol == "rank" else 2
    tasks, dropped = tasks_of(samples, cfg.algo.protocol, most, derived_seed(cfg.seed, "label"))
    say(
        f"{len(tasks)} tasks of {len(samples)} responses; {dropped['empty']} empty and "
        f"{dropped['identical']} identical ones and {dropped['prompts']} prompts with too few left "
        "are dropped"
    )
    if not tasks:
        raise UserError(
            "no prompt has two different responses: raise algo.samples or algo.temperature"
        )
    check_lock(session.out)
    write_tasks(session.out, tasks)
    interrupts.wait_no_more("the tasks are sampled")  # nothing is lost by an end from here on
    (session.out / SAMPLES).unlink(missing_ok=True)  # a link to what it was sampled from


def sampled(session: "Session") -> list[Sample]:
    """Responses of each policy to the same prompts, scored where a reward is given."""
    from rlhf_cli.evaluation.kept import KeptSamples
    from rlhf_cli.rewards.reward import load_reward
    from rlhf_cli.rollout.sampling import Sampling
    from rlhf_cli.runs.policy import policy_of

    cfg: Any = session.cfg
    rows, kept, samples = prompts_of(session), None, []
    policies = [cfg.policy, *cfg.baselines]
    asked = rows.held_out[: cfg.algo.prompts]
    with Bar("label", len(asked) * cfg.algo.samples * len(policies)) as bar:
        for path in policies:
            policy = policy_of(session, path)
            prompts = policy.encoder.prompts(asked)
            reward = None
            if cfg.reward is not None:
                reward = load_reward(cfg.reward, cfg, policy.tokenizer, session.device)
                reward.check([row for row, _ in prompts], session.require)
            if kept is None:
                session.note([*rows.notes, *policy.encoder.report()])
                kept = KeptSamples(session)
            own = kept.of(path, prompts, cfg.algo.samples)
            bar.skip(len(own.done) * cfg.algo.samples)
            rollouts = policy.engine.sample(
                prompts,
                Sampling.of(cfg.algo),
                samples=cfg.algo.samples,
                seed=derived_seed(cfg.seed, "label", path),
                advance=bar.advance,
                kept=own,
            )
            scores = None if reward is None else own.scored("reward", reward, rollouts).total
            samples += samples_of(rollouts, path, None if scores is None else scores.tolist())
    return samples


def prompts_of(session: "Session") -> Split:
    """The prompts whose responses are labelled: all, but of the demo those to learn from.

    What is labelled is learnt from, and the demo's other prompts are what policies are judged by.
    Of rows of a user's it is their hash that keeps the two apart, in every stage alike.
    """
    if session.cfg.data.format == "demo":
        known = session.rows.split(Prompt)
        return Split([], known.train, known.notes)
    return session.rows.to_answer()


def given_samples(session: "Session") -> list[Sample]:
    """What samples=FILE has, scored where a reward is given."""
    cfg: Any = session.cfg
    samples = samples_of_file(cfg.samples)
    session.note([])
    session.claim()
    if cfg.reward is None:
        return samples
    from rlhf_cli.rewards.reward import load_reward
    from rlhf_cli.rollout.rollouts import Rollout
    from rlhf_cli.runs.encoders import encoder_of

    encoder = encoder_of(cfg, session.rows)
    rows = [Prompt(each.prompt, each.columns, each.source) for each in samples]
    reasons = [str(each.origin.get("finish_reason", "eos")) for each in samples]
    texts, ended = [each.text for each in samples], [each != "length" for each in reasons]
    tokens = encoder.written(rows, texts, ended)
    rollouts = [
        Rollout(row, ids, [], reason, text)
        for row, ids, reason, text in zip(rows, tokens, reasons, texts, strict=True)
    ]
    reward = load_reward(cfg.reward, cfg, encoder.tokenizer, session.device)
    reward.check(rows, session.require)
    for sample, value in zip(samples, reward.score(rollouts).total.tolist(), strict=True):
        sample.origin["reward"] = None if value != value else value
    return samples


def samples_of(rollouts: Any, policy: str, rewards: list[float] | None) -> list[Sample]:
    """Rollouts of a policy as samples; a reward that is not known is None."""
    samples = []
    for i, each in enumerate(rollouts):
        origin: dict[str, Any] = {
            "policy": policy,
            "finish_reason": each.finish_reason,
            "tokens": len(each.tokens.response),
            "logprob": round(sum(each.logprobs), 4),
        }
        if rewards is not None:
            origin["reward"] = None if rewards[i] != rewards[i] else rewards[i]
        samples.append(Sample(each.row.prompt, each.text, each.row.source, origin))
    return samples


# --------------------------------------------------------------------------- labels


def desks_of(cfg: LabelConfig) -> dict[str, Desk]:
    """The desk of each annotator, with what was answered before."""
    out = Path(cfg.out)
    seed = derived_seed(cfg.seed, "deal")
    turns = dealt(read_tasks(out), cfg.annotators, cfg.algo.overlap, cfg.algo.repeat, seed)
    told = instructions_of(cfg)
    terms = Terms(cfg.algo.protocol, cfg.source, None if told is None else text_hash(told)[:16])
    return {who: Desk(out, who, own, terms, lambda: check_lock(out)) for who, own in turns.items()}


def instructions_of(cfg: LabelConfig) -> str | None:
    """The text that annotators judge by."""
    return None if cfg.instructions is None else Path(cfg.instructions).read_text(encoding="utf-8")


def collected(cfg: LabelConfig) -> dict[str, Desk]:
    """Let whoever labels answer what is left."""
    desks = desks_of(cfg)
    if cfg.source == "file":
        assert cfg.labels is not None  # validate() asks for it
        label_by_file(desks, cfg.labels, Path(cfg.out))
    elif cfg.source == "reward":
        for desk in desks.values():
            label_by_reward(desk, cfg.flip, derived_seed(cfg.seed, "flip"))
    elif cfg.source == "page":
        from rlhf_cli.labelling import server

        server.label(desks, instructions_of(cfg), cfg.accept_partial, cfg.port)
    else:
        terminal.label(desks[cfg.who or cfg.annotators[0]], instructions_of(cfg))
    return desks


# --------------------------------------------------------------------------- the end


def sealed(cfg: LabelConfig, plan: Plan) -> Path:
    """Write rows and report, and seal the folder."""
    from rlhf_cli.labelling import report as reporting
    from rlhf_cli.runs.session import begin

    session = begin(cfg, plan)
    if session is None:
        return Path(cfg.out)
    session.claim()
    desks = list(desks_of(cfg).values())
    tasks = read_tasks(session.out)
    answers = counted((each for desk in desks for each in desk.answered), cfg.algo.protocol)
    if not answers:
        raise RunError(f"{cfg.out}: no task has a label, so there is nothing to seal")
    made = rows_of(answers, cfg.algo.protocol)
    report = reporting.report_of(desks, tasks, derived_seed(cfg.seed, "ratings"))
    report["rows"] = {name: len(rows) for name, rows in made.items()}
    if cfg.flip:
        report["flips"] = reporting.crowd(report, cfg.flip)
    folder = staging(session.out)
    for name, rows in made.items():
        if rows:  # a file without rows is none
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / name).write_text(text, encoding="utf-8")
    (folder / REPORT).write_text(json.dumps(round_figures(report), indent=2) + "\n")
    show(report)
    told = reporting.sentence(report)
    return session.finish("labels", reporting.headline(report), told)


def show(report: dict[str, Any]) -> None:
    """Ratings as a table, and what they do not tell apart."""
    from rlhf_cli.labelling.report import inseparable, table_of

    if lines := table_of(report):
        heads = ("policy", "rating", "95 %", "above")[: len(lines[0])]
        if len(lines[0]) == 3:
            heads = ("policy", "up", "labels")
        table("", heads, lines)
    for ours, theirs in inseparable(report):
        say(f"{ours} and {theirs} are not separable by {report['labels']} labels")
