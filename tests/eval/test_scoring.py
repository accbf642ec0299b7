"""How a prompt is read: what a method computed and kept, and dense attention's shared prefill."""

from dataclasses import dataclass

import pytest
from torch import Tensor

from minference.eval.runner import Subject
from minference.eval.scoring import Reading, read_sample
from minference.eval.tasks import Sample, make_sample
from minference.index import SparseIndex
from minference.methods import AShape, Dense
from minference.methods.base import Context, Method


def sample_of(placement: str) -> Sample:
    return make_sample("single", 1024, 3, num_questions=3, placement=placement)  # type: ignore[arg-type]


def read(subject: Subject, method: Method, sample: Sample, **options: object) -> list[Reading]:
    return read_sample(subject.model, subject.tokenizer, method, sample, **options)  # type: ignore[arg-type]


def test_dense_attention_reads_a_prompt_once_for_all_its_questions(subject: Subject) -> None:
    sample = sample_of("end")
    (together,) = read(subject, Dense(), sample)
    alone = [
        read(subject, Dense(), sample, skip=frozenset({0, 1, 2} - {index}))[0].outcomes[0]
        for index in range(3)
    ]
    assert list(together.outcomes) == alone
    assert together.tokens == len(sample.prompt) + 1


@pytest.mark.parametrize("placement", ["end", "spread", "cached"])
def test_a_method_that_keeps_everything_answers_as_dense_does(
    placement: str, subject: Subject
) -> None:
    sample = sample_of(placement)
    dense, whole = (
        [outcome for reading in read(subject, method, sample) for outcome in reading.outcomes]
        for method in (Dense(), AShape(sink=0, local=4096))
    )
    assert dense == whole
    (reading, *_) = read(subject, AShape(sink=0, local=4096), sample)
    assert reading.layers.density == [1.0] * 4
    assert reading.layers.recall == pytest.approx([1.0] * 4, abs=1e-4)


def test_cached_reads_the_prompt_once_and_each_question_as_a_chunk(subject: Subject) -> None:
    chunks = []

    @dataclass(frozen=True, kw_only=True)
    class Watched(AShape):
        def build_index(self, q: Tensor, k: Tensor, context: Context) -> SparseIndex:
            if context.layer == 0:
                chunks.append((q.shape[2], k.shape[2]))
            return super().build_index(q, k, context)

    sample = sample_of("cached")
    (reading,) = read(subject, Watched(sink=0, local=64), sample)
    prompt, asked = len(sample.prompt) + 1, [len(q.prompt) for q in sample.questions]
    assert chunks == [(prompt, prompt), *((n, prompt + n) for n in asked)]
    assert [outcome.index for outcome in reading.outcomes] == [0, 1, 2]


def test_a_narrow_window_shows_what_it_lost(subject: Subject) -> None:
    (reading,) = read(subject, AShape(sink=0, local=1), sample_of("spread"))
    layers = reading.layers
    assert len(layers.density) == len(layers.recall) == len(layers.output_error) == 4
    assert max(layers.density) < 0.6
    assert max(layers.recall) < 0.9
    assert max(layers.recall_min) < min(layers.recall)
    assert min(layers.output_error) > 0.05
    assert reading.seconds > 0
    assert subject.model.config._attn_implementation == "sdpa"


def test_a_threshold_of_the_methods_own_counts(subject: Subject) -> None:
    (reading,) = read(subject, AShape(sink=0, local=1, min_seq_len=4096), sample_of("spread"))
    assert reading.layers.density == [1.0] * 4
