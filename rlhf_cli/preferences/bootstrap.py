"""reference=bootstrap: SFT on the chosen side, from which policy and reference start."""

from pathlib import Path
from typing import Any

from rlhf_cli.config.errors import UserError
from rlhf_cli.config.stages import stage_name
from rlhf_cli.data.batches import EpochBatches
from rlhf_cli.data.items import Tokens, response_tokens
from rlhf_cli.folders.files import seal_whole, whole_folder
from rlhf_cli.folders.integrity import fault_in
from rlhf_cli.folders.manifest import read_manifest
from rlhf_cli.models.assembled import assembled
from rlhf_cli.models.dtypes import type_to_write
from rlhf_cli.models.forward import response_nll
from rlhf_cli.models.layouts import layout_of
from rlhf_cli.models.load import load_weights
from rlhf_cli.models.save import save_model, set_stop_ids
from rlhf_cli.ranks.agreement import by_main
from rlhf_cli.reporting.console import Bar, say
from rlhf_cli.runs.lock import check_lock
from rlhf_cli.runs.policy import Policy
from rlhf_cli.runs.session import Session
from rlhf_cli.training.loss_term import Loss, LossTerm
from rlhf_cli.training.optimize import Optimizer

BOOTSTRAP = "bootstrap"


def bootstrap(session: Session, policy: Policy, chosen: list[Tokens]) -> None:
    """SFT of the policy on chosen responses, kept as `out/bootstrap`, a policy folder.

    Where no SFT model exists, DPO starts from this maximum-likelihood fit, policy and reference
    alike (2305.18290 sec. 4, "DPO outline"). A folder that is there already is loaded. Of several
    ranks the first looks after it, and writes it.
    """
    cfg: Any = session.cfg
    if not chosen:
        raise UserError("reference=bootstrap imitates chosen responses, but no row has one")
    session.claim()
    folder = session.out / BOOTSTRAP
    there, fault = by_main(lambda: _found(folder))
    if there and fault is None:
        load_weights(policy.model, str(folder), cfg.model)
        return
    if there:
        say(f"{fault}; the bootstrap is made again")
    algo, hardware = cfg.algo, cfg.hardware
    epochs = algo.bootstrap_epochs or 1
    batches = EpochBatches(chosen, algo.batch_size, epochs, cfg.seed, "bootstrap")
    rate = algo.bootstrap_lr or algo.rate
    optimizer = Optimizer({"policy": (policy.model, rate)}, algo, len(batches), hardware)

    def loss(sequences: list[Tokens]) -> Loss:
        return response_nll(policy.model, sequences, hardware), {}

    layout = layout_of(policy.model, hardware)
    say(f"bootstrap: SFT on {len(chosen)} chosen responses, {len(batches)} steps")
    with Bar("bootstrap", len(batches)) as bar:
        for batch in batches:
            term = LossTerm.of(batch, loss, response_tokens(batch), hardware, layout)
            metrics = optimizer.step([term])
            bar.advance(1, f"loss {metrics['loss']:.3f}")
    set_stop_ids(policy.model, policy.tokenizer, policy.encoder.stop_ids)
    with assembled(policy.model, adapter_alone=True):
        by_main(lambda: _write(session, policy, folder))


def _found(folder: Path) -> tuple[bool, str | None]:
    """Whether a bootstrap is there, and what is wrong with it."""
    if not folder.is_dir():
        return False, None
    return True, fault_in(folder, (read_manifest(folder) or {}).get("files", {}))


def _write(session: Session, policy: Policy, folder: Path) -> None:
    cfg: Any = session.cfg
    check_lock(session.out)
    # what is written is what the run goes on with, so that a resumed one is the same
    dtype = type_to_write(policy.model, cfg.model.save_dtype, merge=False)
    with whole_folder(folder) as part:
        save_model(policy.model, policy.tokenizer, part, False, dtype)
        seal_whole(part, {"stage": stage_name(cfg), "kind": "policy"})
        check_lock(session.out)
