import sys, os, time, warnings
from dataclasses import replace
from pathlib import Path
import torch
from tests.ranks import on_ranks
from tests.model_families import FAMILIES, build
from tests.toys import composed, hardware_of, model_of, sequences_of
from rlhf_cli.models.load import load_policy
from rlhf_cli.models.tokenizers import load_tokenizer
from rlhf_cli.models.forward import response_nll
from rlhf_cli.models.shards import whole, own_part, is_sharded
from rlhf_cli.models.adapters import trained
from rlhf_cli.models.reference import Reference
from rlhf_cli.models.score import logprobs_of, values_of
from rlhf_cli.models.scorers import scorer_from_policy
from rlhf_cli.models.layouts import layout_of
from rlhf_cli.data.items import Tokens
from rlhf_cli.ranks.world import world
from rlhf_cli.training.loss_term import LossTerm
from rlhf_cli.training.optimize import Optimizer


def work(path, over, settings, hw):
    warnings.filterwarnings("ignore")
    world().shard(over)
    hardware = replace(hardware_of(gradient_checkpointing=False, tokens_per_microbatch=40), **hw)
    cfg = model_of(**{"dtype": "float32", **settings})
    tok = load_tokenizer(path, cfg)
    torch.manual_seed(0)
    model = load_policy(path, cfg, tok, torch.device("cpu"))
    if hw.get("gradient_checkpointing"):
        from rlhf_cli.models.recompute import recompute_activations

        recompute_activations(model)
    ref = Reference(model)
    torch.manual_seed(1)
    critic = scorer_from_policy(path, cfg, tok, 3, torch.device("cpu"), base=model)
    seqs = sequences_of(8)
    from rlhf_cli.models.forward import state_values, token_logprobs
    from rlhf_cli.models.layouts import batch_of

    def loss(s):
        layout = layout_of(model, hardware)
        batch = batch_of(model, s, layout)
        scored = token_logprobs(model, batch, chunk=7, with_entropy=True, reference=ref)
        v = state_values(critic, batch)
        total = (
            -(scored.logprobs * batch.response).sum()
            + 0.1 * scored.kl.sum()
            + 0.01 * scored.entropy.sum()
            + (v * batch.response).pow(2).sum()
        )
        return total, {"kl": scored.kl.sum().detach()}

    algo = replace(composed("dpo").algo, lr=1e-3, max_grad_norm=0.5)
    opt = Optimizer({"policy": (model, 1e-3), "critic": (critic, 1e-3)}, algo, 9, hardware)
    layout = layout_of(model, hardware)
    layout_of(critic, hardware)
    reports = []
    for i in range(3):
        reports.append(opt.step([LossTerm.of(seqs, loss, 40.0, hardware, layout)]))
    lp = torch.cat(logprobs_of(model, seqs, hardware))
    with ref.active() as r:
        lr = torch.cat(logprobs_of(r, seqs, hardware))
    vals = torch.cat(values_of(critic, seqs, hardware))
    same = ref.digest() == ref.hash
    w = [
        {n: whole(x.detach().float()).clone() for n, x in trained(m).items()}
        for m in (model, critic)
    ]
    sh = sum(is_sharded(x) for x in model.parameters())
    return {
        "w": [{n: x.tolist() for n, x in d.items()} for d in w],
        "lp": lp.tolist(),
        "lr": lr.tolist(),
        "v": vals.tolist(),
        "same": same,
        "norms": [(r["grad_norm/policy"], r["grad_norm/critic"]) for r in reports],
        "sh": sh,
    }


if __name__ == "__main__":
    over = sys.argv[1]
    ranks = int(sys.argv[2])
    settings = eval(sys.argv[3])
    hw = eval(sys.argv[4])
    names = sys.argv[5:] or list(FAMILIES)
    for n in names:
        p = Path(f"/tmp/fams/{n}")
        if not p.exists():
            p.parent.mkdir(exist_ok=True)
            build(n, p)
        t = time.time()
        try:
            (a,) = on_ranks(1, work, str(p), "none", settings, hw, seconds=280)
        except AssertionError as e:
            print("BASE", n, str(e).strip().splitlines()[-1][:200], flush=True)
            continue
        try:
            rs = on_ranks(ranks, work, str(p), over, settings, hw, seconds=280)
        except AssertionError as e:
            open(f"/tmp/fail-{n}.txt", "w").write(str(e))
            ls = [l for l in str(e).splitlines() if "Error" in l]
            print("FAIL", n, *ls[:2], sep="\n    ", flush=True)
            continue
        o = []
        for r in rs:
            dw = 0
            wn = ""
            for x, y in zip(a["w"], r["w"]):
                if x.keys() != y.keys():
                    print("keys differ", x.keys() ^ y.keys())
                for k in x:
                    d = (torch.tensor(x[k]) - torch.tensor(y[k])).abs().max().item()
                    if d > dw or d != d:
                        dw = d
                        wn = k
            f = lambda k: (torch.tensor(a[k]) - torch.tensor(r[k])).abs().max().item()
            dn = max(abs(i - j) / i for x, y in zip(a["norms"], r["norms"]) for i, j in zip(x, y))
            o.append(
                f"dw {dw:.1e} {wn} lp {f('lp'):.0e} ref {f('lr'):.0e} v {f('v'):.0e} norm {dn:.0e} {r['same']} sharded {r['sh']}"
            )
        print("ok ", n, *dict.fromkeys(o), f"{time.time() - t:.0f}s", flush=True)
