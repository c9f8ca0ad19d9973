"""Rows as tokens in Arrow: the same as in memory, kept on disk, read again, mixed and streamed."""

import json
import os
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf_cli.config.errors import UserError
from rlhf_cli.config.schema.data import Data
from rlhf_cli.data import dataset as datasets
from rlhf_cli.data.batches import EpochBatches, draw
from rlhf_cli.data.dataset import Dataset, dataset_of
from rlhf_cli.data.duplicates import near_of
from rlhf_cli.data.kinds import Demonstration, Feedback, Preference, Prompt, Ranking, Text
from rlhf_cli.data.mixing import epoch_size, quotas
from rlhf_cli.data.reading import Walk
from rlhf_cli.data.rows import Rows, read_split
from rlhf_cli.data.sources import check_sources, sources_of
from rlhf_cli.data.store import Items, Joined
from rlhf_cli.data.streaming import Stream, StreamBatches, streamed
from rlhf_cli.data.survey import surveyed
from rlhf_cli.data.tokens import Encoder
from rlhf_cli.ranks.world import world
from tests.ranks import on_ranks
from tests.toys import bpe, data_of


def write(file: Path, rows: list[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def pairs(count: int, word: str = "cat") -> list[dict[str, Any]]:
    return [
        {"prompt": f"{word} {i}?", "chosen": f"the {i}", "rejected": "a dog", "id": i}
        for i in range(count)
    ]


def asked(more: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of twenty prompts."""
    return [{"prompt": f"p {i}", **more} for i in range(20)]


def made(data: Data, kind: type) -> Dataset:
    return dataset_of(Rows(data).places(kind), kind, data, Encoder(bpe(), data))


KINDS: list[tuple[type, list[dict[str, Any]]]] = [
    (Preference, pairs(40)),
    (
        Ranking,
        [
            {"prompt": f"p {i}", "responses": ["a", "b b", "c"], "ranks": [1, 2, 2]}
            for i in range(20)
        ],
    ),
    (
        Feedback,
        [{"prompt": f"p {i}", "completion": f"c {i}", "label": i % 2 == 0} for i in range(20)],
    ),
    (Prompt, [{"prompt": f"p {i}", "answer": {"deep": [i, None]}} for i in range(20)]),
    (Demonstration, [{"prompt": f"p {i}", "completion": f"c {i}"} for i in range(20)]),
    (Text, [{"text": f"the cat sat {i}"} for i in range(20)]),
]


@pytest.mark.parametrize(("kind", "rows"), KINDS)
def test_items_are_what_the_encoder_makes_of_the_rows(
    kind: type, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    """On both sides of the split, in their order, with all that their rows say."""
    data = data_of(path=write(tmp_path / "r.jsonl", rows), eval_rows=4)
    split, items = read_split(data, kind), made(data, kind)
    encoder = Encoder(bpe(), data)
    for ours, theirs in ((items.train, split.train), (items.held_out, split.held_out)):
        assert list(ours) == list(encoder.items(theirs, kind))
    assert len(items.held_out) == 4 and items.train[-1] == items.train[len(items.train) - 1]
    assert items.train[2:5] == [items.train[2], items.train[3], items.train[4]]
    with pytest.raises(IndexError):
        items.train[len(items.train)]


def test_masks_come_back_with_their_sequences(tmp_path: Path) -> None:
    turn = {"role": "user", "content": "cat"}, {"role": "assistant", "content": "dog"}
    rows = [
        {"messages": [*turn, {"role": "user", "content": f"mat {i}"}, turn[1]]} for i in range(6)
    ]
    path = write(tmp_path / "r.jsonl", rows)
    data = data_of(path=path, eval_rows=1, template="chat", chat_template="chatml")
    item = made(data, Demonstration).train[0]
    assert item.loss is not None and 0 < sum(item.loss) < len(item.loss)
    assert len(item.loss) == len(item.response)


def test_many_rows_are_kept_on_disk_and_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By files, tokenizer and options; other ones make another dataset."""
    monkeypatch.setattr(datasets, "SMALL", 100)
    data = data_of(path=write(tmp_path / "r.jsonl", pairs(50)), cache=str(tmp_path / "cache"))
    first = made(data, Preference)
    (folder,) = (tmp_path / "cache").iterdir()

    def no_walk(*args: Any) -> Any:
        raise AssertionError("the rows are read again")

    with monkeypatch.context() as again:
        again.setattr(Walk, "__iter__", no_walk)
        second = made(data, Preference)
    assert list(second.train) == list(first.train)
    assert list(second.held_out) == list(first.held_out)
    assert second.notes == [*first.notes, f"tokens: read from {folder}"]
    for changed in (
        replace(data, template="User: {prompt}"),
        replace(data, max_response_tokens=2, long_responses="cut"),
        replace(data, eval_rows=3),
    ):
        assert list(made(changed, Preference).train) != list(first.train)
    write(tmp_path / "r.jsonl", pairs(51))
    assert len(made(data, Preference).train) + len(made(data, Preference).held_out) == 51
    assert len(list((tmp_path / "cache").iterdir())) == 5


def test_damaged_tokens_are_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "SMALL", 100)
    data = data_of(path=write(tmp_path / "r.jsonl", pairs(50)), cache=str(tmp_path / "cache"))
    first = list(made(data, Preference).train)
    (folder,) = (tmp_path / "cache").iterdir()
    for name in (datasets.TABLE, datasets.NOTES, "train.places.npy"):
        (folder / name).write_bytes(b"x")
        assert list(made(data, Preference).train) == first


def test_a_bad_row_leaves_no_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "SMALL", 100)
    path = write(tmp_path / "r.jsonl", [*pairs(50), {"prompt": "", "chosen": "a"}])
    data = data_of(path=path, cache=str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"r\.jsonl:51"):
        made(data, Preference)
    assert not list((tmp_path / "cache").iterdir())


def by_ranks(path: str, caches: list[str]) -> tuple[str, list[Any], bool]:
    """An error, what a rank has of the rows, and whether it has tokenised them itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "SMALL", 100)
        world().local_rank = 0 if len(set(caches)) > 1 else world().rank
        try:
            dataset = made(data_of(path=path, cache=caches[world().rank]), Preference)
        except UserError as error:
            return str(error), [], False
    items = [[item.prompt, item.responses] for item in [*dataset.train, *dataset.held_out]]
    return "", items, "tokens: read from" not in dataset.notes[-1]


@pytest.mark.slow
def test_ranks_tokenise_once_for_all_that_see_it(tmp_path: Path) -> None:
    path, cache = write(tmp_path / "r.jsonl", pairs(50)), str(tmp_path / "cache")
    first, second = on_ranks(2, by_ranks, path, [cache] * 2)
    assert len(first[1]) == 50 and first[1] == second[1]
    assert (first[2], second[2]) == (True, False)
    assert len(list((tmp_path / "cache").iterdir())) == 1
    own = [str(tmp_path / name) for name in "ab"]  # two machines without a common disk
    for each in on_ranks(2, by_ranks, path, own):
        assert each == ("", first[1], True)
    path = write(tmp_path / "bad.jsonl", [*pairs(50), {"prompt": "", "chosen": "a"}])
    for fault, _, _ in on_ranks(2, by_ranks, path, [cache] * 2):
        assert "bad.jsonl:51" in fault


def test_what_a_killed_run_left_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "SMALL", 100)
    cache = tmp_path / "cache"
    for name, age in ((".old.part", 90_000), (".new.part", 60)):
        (cache / name).mkdir(parents=True)
        os.utime(cache / name, (time.time() - age,) * 2)
    made(data_of(path=write(tmp_path / "r.jsonl", pairs(50)), cache=str(cache)), Preference)
    assert not (cache / ".old.part").exists() and (cache / ".new.part").exists()


def test_a_cache_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "SMALL", 100)
    (tmp_path / "file").write_text("")
    data = data_of(path=write(tmp_path / "r.jsonl", pairs(9)), cache=str(tmp_path / "file" / "x"))
    with pytest.raises(UserError, match=r"data\.cache: cannot write .*file"):
        made(data, Preference)


def test_doubtful_pairs_of_both_sides_are_dropped(tmp_path: Path) -> None:
    rows = pairs(30) + [{"prompt": f"cat {i}?", "chosen": "x", "rejected": "x"} for i in range(30)]
    data = data_of(path=write(tmp_path / "r.jsonl", rows), eval_rows=5, doubtful_pairs="drop")
    items = made(data, Preference)
    assert (len(items.train), len(items.held_out)) == (25, 5)
    assert "30 of 60 rows judge a text against itself: dropped" in items.notes


# --------------------------------------------------------------------------- several sources


def mixed(tmp_path: Path, *entries: dict[str, Any], **data: Any) -> Dataset:
    cats = write(tmp_path / "cats.jsonl", pairs(30, "cat"))
    dogs = write(tmp_path / "dogs.jsonl", pairs(10, "dog"))
    sources = [{"path": path, **entry} for path, entry in zip((cats, dogs), entries, strict=True)]
    return made(data_of(path=None, sources=sources, eval_rows=1, **data), Preference)


def seen(items: Any, epochs: int, batch: int = 4) -> list[Counter[str]]:
    """How often each prompt comes in each epoch."""
    batches = EpochBatches(items, batch, epochs, seed=3, name="x")
    every = [batches[step] for step in range(len(batches))]
    per = len(batches) // epochs
    return [
        Counter(item.row.prompt for each in every[epoch * per : (epoch + 1) * per] for item in each)
        for epoch in range(epochs)
    ]


def test_sources_are_read_one_after_the_other_and_shuffled_together(tmp_path: Path) -> None:
    items = mixed(tmp_path, {}, {}).train
    assert [source.name for source in items.sources] == ["cats.jsonl", "dogs.jsonl"]
    assert np.bincount(items.parts).sum() == len(items) == 39
    (counts,) = seen(items, 1)
    assert set(counts.values()) == {1}


def test_a_source_is_capped_and_repeated(tmp_path: Path) -> None:
    items = mixed(tmp_path, {"cap": 12}, {"repeat": 3}).train
    cats, dogs = np.bincount(items.parts).tolist()
    assert cats + dogs == 21
    assert epoch_size(items) == cats + 3 * dogs
    (counts,) = seen(items, 1)
    assert {count for prompt, count in counts.items() if prompt.startswith("cat")} == {1}
    assert {count for prompt, count in counts.items() if prompt.startswith("dog")} == {3}


def test_weights_are_shares_of_an_epoch(tmp_path: Path) -> None:
    """No row of a source comes twice before all others of it did, over epochs too."""
    items = mixed(tmp_path, {"weight": 1}, {"weight": 3}).train
    size = len(items)
    counts = seen(items, 2)
    for each in counts:
        dogs = sum(count for prompt, count in each.items() if prompt.startswith("dog"))
        assert dogs == round(size * 3 / 4) and each.total() == epoch_size(items)
    whole = counts[0] + counts[1]
    for word, rows in (("cat", items.parts == 0), ("dog", items.parts == 1)):
        times = [count for prompt, count in whole.items() if prompt.startswith(word)]
        times += [0] * (int(rows.sum()) - len(times))
        assert max(times) - min(times) <= 1


def test_a_small_weight_is_not_none(tmp_path: Path) -> None:
    items = mixed(tmp_path, {"weight": 0.001}, {"weight": 1}).train
    assert quotas(items)[0][1] == 1


def test_sources_of_one_name_are_told_apart_and_no_file_is_read_twice(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "train.jsonl", pairs(3))
    paths = [str(tmp_path / folder / "train.jsonl") for folder in ("a", "b")]
    sources = sources_of(data_of(path=None, sources=[{"path": path} for path in paths]))
    assert [source.name for source in sources] == paths
    check_sources(sources)
    with pytest.raises(UserError, match="is named twice"):
        check_sources([*sources, sources[0]])


def test_a_count_that_nothing_holds_out_is_told(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write(tmp_path / f"{split}.jsonl", pairs(9, split))
    data = data_of(path=str(tmp_path), eval_rows=3)
    (line,) = [note for note in made(data, Preference).notes if "eval_rows" in note]
    assert line.startswith("data.eval_rows=3 is not used: ") and "test.jsonl" in line
    own = data_of(path=None, sources=[{"path": str(tmp_path)}], eval_rows=1)
    assert "test.jsonl" in made(own, Preference).notes[0]  # as not read
    assert len(made(own, Preference).train) == 8


def test_draws_follow_the_weights(tmp_path: Path) -> None:
    items = mixed(tmp_path, {"weight": 1}, {"weight": 1}).train
    drawn = [item for step in range(13) for item in draw(items, 3, 0, "p", step)]
    dogs = sum(item.row.prompt.startswith("dog") for item in drawn)
    assert len(drawn) == 39 and abs(dogs - 19.5) <= 1.5
    again = [item for step in reversed(range(13)) for item in draw(items, 3, 0, "p", step)[::-1]]
    assert again[::-1] == drawn


def test_items_and_texts_are_joined() -> None:
    joined: Joined[str] = Joined("abc", "de")
    assert (list(joined), joined[3], joined[-1], joined[2:4]) == (
        list("abcde"),
        "d",
        "e",
        ["c", "d"],
    )
    assert len(Items.none()) == 0


@pytest.mark.parametrize(
    ("sources", "said"),
    [
        (["a.jsonl"], r"data\.sources\[0\]: expected \{path: \.\.\."),
        ([{"path": "a", "wieght": 2}], r"unknown key wieght; did you mean weight\?"),
        ([{"path": "a", "cap": 0}], r"data\.sources\[0\]\.cap=0: expected a whole number from 1"),
        ([{"path": "a", "weight": True}], "expected a number above 0"),
        ([{"path": ""}], "expected a file"),
        ([{"path": "a", "shape": "sharegtp"}], r"shape=sharegtp; did you mean sharegpt\?"),
        ([{"path": "a", "weight": 1}, {"path": "b"}], "give each source a weight, or none"),
        ([{"path": "a", "weight": 1, "repeat": 2}], "give no repeat beside it"),
    ],
)
def test_a_wrong_source_is_told(sources: list[Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        sources_of(data_of(path=None, sources=sources))


# --------------------------------------------------------------------------- streaming


def stream_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int = 90) -> Stream[Any]:
    monkeypatch.setattr("rlhf_cli.data.streaming.WINDOW", 16)
    data = data_of(path=write(tmp_path / "r.jsonl", pairs(count, "dog")), eval_share=0.1)
    places = Rows(data).places(Preference)
    split = streamed(places, Preference, data, Encoder(bpe(), data), lambda row: None)
    train: Stream[Any] = split.train
    held = {item.row.prompt for item in split.held_out}
    assert held and held == {row.prompt for row in Rows(data).held_out(Preference).held_out}
    return train


def test_a_stream_has_every_training_row_once_in_an_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = stream_of(tmp_path, monkeypatch)
    rows = sum(1 for _ in stream._rows())
    batches = StreamBatches(stream, 1, 2 * rows, seed=0, name="x")
    taken = [batches[step][0].row.prompt for step in range(2 * rows)]
    assert sorted(taken[:rows]) == sorted(taken[rows:]) == sorted(set(taken))
    assert taken[:rows] != taken[rows:]


def test_a_stream_goes_on_where_it_stood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At any step, of any epoch, whatever the batch has to do with the window."""
    stream = stream_of(tmp_path, monkeypatch)
    whole = StreamBatches(stream, 7, 20, seed=0, name="x")
    expected = [[item.row.prompt for item in whole[step]] for step in range(20)]
    for stop in (0, 1, 2, 6, 13):
        begun = StreamBatches(stream, 7, 20, seed=0, name="x")
        for step in range(stop):
            begun[step]
        state = json.loads(json.dumps(begun.state()))
        resumed = StreamBatches(stream, 7, 20, seed=0, name="x")
        resumed.load(state)
        rest = [[item.row.prompt for item in resumed[step]] for step in range(stop, 20)]
        assert rest == expected[stop:]


def test_a_stream_that_cuts_its_responses_stops(tmp_path: Path) -> None:
    """Also where the held-out ones are short, and later on."""
    rows = [{"prompt": f"p {i}", "completion": "the cat sat on a mat"} for i in range(40)]
    unseen = write(tmp_path / "eval.jsonl", [{"prompt": "q", "completion": "a"}])
    path = write(tmp_path / "r.jsonl", rows)
    data = data_of(path=path, eval_path=unseen, max_response_tokens=2)
    places = Rows(data).places(Demonstration)
    with pytest.raises(UserError, match="40 of 41 responses are longer"):
        streamed(places, Demonstration, data, Encoder(bpe(), data), lambda row: None)


def test_a_stream_of_which_nothing_is_left_ends(tmp_path: Path) -> None:
    """Its batches would wait for rows for ever; the held-out row is sound."""
    long = [{"prompt": "the cat sat on a mat " * 9, "completion": "a"} for _ in range(20)]
    unseen = write(tmp_path / "eval.jsonl", [{"prompt": "q", "completion": "a"}])
    path = write(tmp_path / "r.jsonl", long)
    data = data_of(path=path, eval_path=unseen, max_prompt_tokens=8, long_prompts="drop")
    places = Rows(data).places(Demonstration)
    split = streamed(places, Demonstration, data, Encoder(bpe(), data), lambda row: None)
    batches: StreamBatches[Any] = StreamBatches(split.train, 4, 3, seed=0, name="x")
    with pytest.raises(UserError, match=r"r\.jsonl: no row is left to learn from: .*prompts over"):
        batches[0]


def test_what_a_stream_reads_is_told(tmp_path: Path) -> None:
    rows = [{"prompt": f"p {i}", "completion": "c", "id": i} for i in range(400)]
    path = write(tmp_path / "r.jsonl", [*rows, {"prompt": "", "completion": "c"}])
    data = data_of(path=path, bad_rows="drop", eval_share=0.1)
    places = Rows(data).places(Demonstration)
    notes = streamed(places, Demonstration, data, Encoder(bpe(), data), lambda row: None).notes
    assert any("1 dropped: column 'prompt' is empty" in note for note in notes)
    assert any("columns not read" in note and "id" in note for note in notes)


# --------------------------------------------------------------------------- what rows are like


def test_near_prompts_are_found() -> None:
    """One token of nine is another: 4 of 10 shingles are shared by neither, of 7 each 4 by both."""
    held_out = [list(range(9)), [50, 51, 52, 53]]
    assert near_of([[0, 1, 2, 3, 4, 5, 6, 7, 99]], held_out) == {0}
    assert near_of([[0, 1, 2, 3, 99, 5, 6, 7, 8]], held_out) == set()  # 4 of 10
    assert near_of([list(range(20, 30))], held_out) == set()


def test_a_survey_counts_what_is_there(tmp_path: Path) -> None:
    rows = [{"prompt": "cat", "completion": "the dog"}] * 3 + [
        {"prompt": f"a {i} small bird", "completion": "sat"} for i in range(5)
    ]
    data = data_of(path=write(tmp_path / "r.jsonl", rows), eval_rows=1)
    items = made(data, Demonstration)
    train = surveyed(items).train
    assert train.items == len(items.train) == len(train.prompts) == len(train.responses)
    assert train.learnt == sum(train.responses)
    assert train.repeated == (2 if len(train.prompts) == 7 else 0)
