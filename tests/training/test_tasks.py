import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import WORDS

from mpifedlora.training.tasks import ClassificationTask, load_tokenizer

TEXTS = st.lists(
    st.lists(st.sampled_from([*WORDS, "unheard-of", "!"]), max_size=20).map(" ".join), min_size=1
)


@pytest.fixture(scope="module")
def tokenizer(tiny_model_folder):
    return load_tokenizer(str(tiny_model_folder))


@pytest.fixture(scope="module")
def task(tokenizer):
    return ClassificationTask(tokenizer, max_length=12)


def labels_for(texts):
    return np.arange(len(texts), dtype=np.int64) % 3


@settings(max_examples=40, deadline=None)
@given(texts=TEXTS, data=st.data())
def test_a_clients_examples_are_those_of_its_texts_alone(task, texts, data):
    places = st.lists(st.integers(0, len(texts) - 1), min_size=1, max_size=8, unique=True)
    owned = np.array(data.draw(places), np.int64)
    labels = labels_for(texts)
    whole = task.encode({"text": texts}, labels)
    mine, alone = whole.take(owned), task.encode({"text": [texts[i] for i in owned]}, labels[owned])
    assert mine.tokens is whole.tokens
    assert len(mine) == len(owned)
    assert mine.lengths.tolist() == alone.lengths.tolist()
    order = np.array(data.draw(st.permutations(range(len(owned)))), np.int64)
    (batch, got), (wanted, expected) = task.collate(mine, order), task.collate(alone, order)
    assert all(torch.equal(batch[name], wanted[name]) for name in wanted)
    assert torch.equal(got, expected)


@settings(max_examples=40, deadline=None)
@given(texts=TEXTS, data=st.data())
def test_batches_are_what_the_tokenizer_itself_pads(task, tokenizer, texts, data):
    places = st.integers(0, len(texts) - 1)
    indices = np.array(data.draw(st.lists(places, min_size=1, max_size=8)), np.int64)
    batch, labels = task.collate(task.encode({"text": texts}, labels_for(texts)), indices)
    expected = tokenizer(
        [texts[i] for i in indices], padding=True, truncation=True, max_length=12, return_tensors="pt"
    )
    assert torch.equal(batch["input_ids"], expected["input_ids"])
    assert torch.equal(batch["attention_mask"], expected["attention_mask"])
    assert labels.tolist() == [i % 3 for i in indices]
    assert {tensor.dtype for tensor in (*batch.values(), labels)} == {torch.int64}


def test_texts_are_cut_to_max_length(task):
    encoded = task.encode({"text": [" ".join(WORDS[:30]), "ba"]}, labels_for("ab"))
    assert encoded.lengths.tolist() == [12, 3]
    assert encoded.tokens.dtype == np.int32
    assert encoded.starts.tolist() == [0, 12]
    assert len(encoded.tokens) == 15


def test_no_texts_give_no_examples(task):
    encoded = task.encode({"text": []}, np.zeros(0, np.int64))
    assert len(encoded) == 0
    assert encoded.lengths.tolist() == []
    assert encoded.starts.tolist() == []
    assert len(encoded.tokens) == 0


def test_one_example_is_a_batch_without_padding(task):
    batch, labels = task.collate(task.encode({"text": ["ba da"]}, np.array([2])), np.array([0]))
    first = 5 + np.array([WORDS.index("ba"), WORDS.index("da")])
    assert batch["input_ids"].tolist() == [[2, *first, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1]]
    assert labels.tolist() == [2]


def test_an_empty_text_keeps_its_row(task):
    batch, _ = task.collate(task.encode({"text": ["", "ba"]}, labels_for("ab")), np.array([0, 1]))
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]


def test_loss_is_the_mean_cross_entropy_and_predictions_are_by_example(task):
    rows, labels = [[1.0, 2.0, 0.5], [0.0, -1.0, 3.0]], [1, 0]
    losses = [
        math.log(sum(math.exp(x) for x in row)) - row[label] for row, label in zip(rows, labels, strict=True)
    ]
    logits, targets = torch.tensor(rows), torch.tensor(labels)
    assert task.loss(logits, targets).item() == pytest.approx(sum(losses) / 2, rel=1e-6)
    predictions = task.measure(lambda _: logits, {}, targets)
    assert predictions.dtype == torch.float32
    assert predictions[:, 0].tolist() == pytest.approx(losses, rel=1e-6)
    assert predictions[:, 1].tolist() == [1, 2]


def test_loss_is_float32_on_bfloat16_logits(task):
    logits = torch.randn(4, 3).bfloat16()
    labels = torch.tensor([0, 1, 2, 0])
    assert task.loss(logits, labels).dtype == torch.float32
    assert task.loss(logits, labels) == task.loss(logits.float(), labels)
    assert task.measure(lambda _: logits, {}, labels)[:, 0].mean() == pytest.approx(
        task.loss(logits, labels).item()
    )


def test_a_tokenizer_without_padding_token_pads_with_its_end_token(tokenizer, tmp_path):
    saved = type(tokenizer)(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token="[SEP]", unk_token="[UNK]"
    )
    saved.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    task = ClassificationTask(load_tokenizer(str(tmp_path)), max_length=12)
    batch, _ = task.collate(task.encode({"text": ["ba", "ba da"]}, labels_for("ab")), np.array([0, 1]))
    assert batch["input_ids"][0, -1] == 3
    assert batch["attention_mask"][0].tolist() == [1, 1, 1, 0]


# the cache


class Cache:
    """Keeps what it was asked for, and gives what was made first."""

    def __init__(self):
        self.asked, self.kept = [], {}

    def __call__(self, texts, settings, tokenize):
        self.asked.append((tuple(texts), settings))
        if self.asked[-1] not in self.kept:
            self.kept[self.asked[-1]] = tokenize(texts)
        return self.kept[self.asked[-1]]


def cached_task(folder, cache, max_length=12, **changes):
    tokenizer = load_tokenizer(str(folder))
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    return ClassificationTask(tokenizer, max_length, "cpu", cache)


def test_equal_texts_share_their_tokens(tiny_model_folder):
    cache, texts = Cache(), ["ba da", "ka"]
    first, again = (
        cached_task(tiny_model_folder, cache).encode({"text": texts}, labels_for(texts)) for _ in range(2)
    )
    assert first.tokens is again.tokens
    assert len(cache.kept) == 1
    plain = cached_task(tiny_model_folder, None).encode({"text": texts}, labels_for(texts))
    assert first.tokens.tolist() == plain.tokens.tolist()
    assert first.starts.tolist() == plain.starts.tolist() == [0, 4]


def test_the_settings_do_not_depend_on_the_last_call(tiny_model_folder):
    task = cached_task(tiny_model_folder, Cache())
    task.encode({"text": ["ba da"]}, np.zeros(1, np.int64))
    task.tokenizer(["ba da", "ka"], padding="max_length", truncation=True, max_length=7)
    assert ClassificationTask(task.tokenizer, 12).settings == cached_task(tiny_model_folder, None).settings


def test_whatever_changes_tokens_changes_the_settings(tiny_model_folder):
    tasks = [
        cached_task(tiny_model_folder, None),
        cached_task(tiny_model_folder, None, 13),
        cached_task(tiny_model_folder, None, truncation_side="left"),
        cached_task(tiny_model_folder, None, split_special_tokens=True),
        cached_task(tiny_model_folder, None, pad_token="[MASK]"),
    ]
    more_words = cached_task(tiny_model_folder, None)
    more_words.tokenizer.add_tokens(["unheard-of"])
    assert len({task.settings for task in [*tasks, more_words]}) == 6


def test_a_tokenizer_that_cannot_be_told_from_others_is_not_cached():
    class Letters:
        pad_token_id = 0

        def __call__(self, texts, **options):
            return {"input_ids": [list(map(ord, text)) for text in texts]}

    cache = Cache()
    encoded = ClassificationTask(Letters(), 12, "cpu", cache).encode({"text": ["ab", ""]}, np.array([0, 1]))
    assert encoded.tokens.tolist() == [97, 98, 0]
    assert cache.asked == []
