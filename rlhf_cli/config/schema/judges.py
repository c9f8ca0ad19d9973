"""Keys of a language model that compares responses, which evaluate and label share."""

from dataclasses import dataclass

from rlhf_cli.config.schema.keys import key


@dataclass
class JudgeKeys:
    """Which model is asked, how, and at what cost."""

    judge: str | None = key(
        "Language model that judges pairs: a policy folder or hub id, or the address of an "
        "endpoint with the chat route of OpenAI, as https://host/v1; its key is JUDGE_API_KEY or "
        "OPENAI_API_KEY of the environment; null asks none.",
        role="policy",
    )
    judge_model: str | None = key("Name of the model at that endpoint.", used_by="judge")
    judge_prompt: str | None = key(
        "File with the question, with {prompt}, {first}, {second} and, with principles, "
        "{principle} in it; null is ours.",
        used_by="judge",
    )
    principles: str | None = key(
        "File of principles, one on each line, of which every pair is judged by one that is drawn "
        "(constitutional AI); null judges by none.",
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
        "Cost by judge_prices, of all starts of a run together, at which it asks an endpoint no "
        "more and ends, its verdicts kept; the calls under way then are still paid. null sets no "
        "limit.",
        gt=0,
        used_by="judge",
    )
