"""Head patterns: the shipped tables, both file layouts, look-up, and what a bad file says."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minference.errors import PatternFileError, UnsupportedError
from minference.head_patterns import (
    DEFAULT_PATTERN,
    FILE_NAME,
    HeadPatterns,
    default_patterns,
    get_support_models,
)
from minference.patterns import AShape, BlockSparse, Dense, Pattern, TriShape, VerticalSlash
from minference.provenance import Provenance

# ids and per-pattern head counts as published, written down apart from the shipped tables
PUBLISHED_IDS = [
    "gradientai/Llama-3-8B-Instruct-262k",
    "gradientai/Llama-3-8B-Instruct-Gradient-1048k",
    "gradientai/Llama-3-8B-Instruct-Gradient-4194k",
    "gradientai/Llama-3-70B-Instruct-Gradient-262k",
    "gradientai/Llama-3-70B-Instruct-Gradient-1048k",
    "01-ai/Yi-9B-200K",
    "microsoft/Phi-3-mini-128k-instruct",
    "Qwen/Qwen2-7B-Instruct",
    "Qwen/Qwen2.5-7B-Instruct",
    "Qwen/Qwen2.5-32B-Instruct",
    "Qwen/Qwen2.5-72B-Instruct",
    "Qwen/Qwen2.5-7B-Instruct-1M",
    "Qwen/Qwen2.5-14B-Instruct-1M",
    "THUDM/glm-4-9b-chat-1m",
    "meta-llama/Llama-3.1-8B-Instruct",
    "meta-llama/Llama-3.1-70B-Instruct",
    "meta-llama/Meta-Llama-3.1-8B-Instruct",
    "meta-llama/Meta-Llama-3.1-70B-Instruct",
]
PUBLISHED_COUNTS: list[tuple[str, tuple[int, int], dict[Pattern, int]]] = [
    (
        "gradientai/Llama-3-8B-Instruct-262k",
        (32, 32),
        {
            VerticalSlash(1000, 6096): 473,
            VerticalSlash(3500, 100): 89,
            VerticalSlash(30, 800): 278,
            VerticalSlash(100, 800): 153,
            VerticalSlash(500, 700): 31,
        },
    ),
    ("meta-llama/Llama-3.1-8B-Instruct", (32, 32), {VerticalSlash(512, 2048): 1024}),
    (
        "microsoft/Phi-3-mini-128k-instruct",
        (32, 32),
        {
            VerticalSlash(1000, 6096): 277,
            VerticalSlash(3500, 100): 378,
            VerticalSlash(30, 800): 50,
            VerticalSlash(500, 700): 92,
            VerticalSlash(100, 750): 184,
            AShape(100, 800): 43,
        },
    ),
    (
        "01-ai/Yi-9B-200K",
        (48, 32),
        {
            VerticalSlash(1000, 4096): 536,
            VerticalSlash(3500, 100): 200,
            VerticalSlash(30, 800): 266,
            VerticalSlash(100, 800): 474,
            VerticalSlash(500, 700): 60,
        },
    ),
    (
        "THUDM/glm-4-9b-chat-1m",
        (40, 32),
        {
            VerticalSlash(1000, 6096): 1026,
            VerticalSlash(3500, 100): 145,
            VerticalSlash(30, 800): 77,
            VerticalSlash(100, 800): 14,
            VerticalSlash(500, 700): 18,
        },
    ),
]
MIXED = HeadPatterns(
    ((VerticalSlash(30, 800), AShape(1, 2)), (BlockSparse(7, 128), VerticalSlash(3, 4))),
    scores=((0.5, None), (1, 12345678)),
)
EVERY_KIND = HeadPatterns(
    ((Dense(), AShape(1, 2), TriShape(1, 2, 3)), (BlockSparse(7), VerticalSlash(3, 4), Dense())),
    Provenance(model="a/b", aliases=("c/d",), tokens=10, recall=0.9, date="2026-01-02"),
)


def test_every_published_id_is_served() -> None:
    assert set(PUBLISHED_IDS) <= set(get_support_models())
    assert len(PUBLISHED_IDS) == 18


@pytest.mark.parametrize("name", get_support_models())
def test_a_shipped_table_has_its_provenance(name: str) -> None:
    table = HeadPatterns.from_pretrained(name)
    assert name in (table.provenance.model, *table.provenance.aliases)
    assert table.provenance.architectures
    assert table.provenance.basis


@pytest.mark.parametrize(
    ("name", "shape", "counts"), PUBLISHED_COUNTS, ids=[name for name, _, _ in PUBLISHED_COUNTS]
)
def test_shipped_tables_have_the_published_counts(
    name: str, shape: tuple[int, int], counts: dict[Pattern, int]
) -> None:
    table = HeadPatterns.from_pretrained(name)
    assert table.shape == shape
    assert table.counts() == Counter(counts)


def test_order_of_heads_is_the_published_one() -> None:
    row = HeadPatterns.from_pretrained("gradientai/Llama-3-8B-Instruct-Gradient-1048k")[0]
    assert row[15:20] == (
        VerticalSlash(1000, 6096),
        *[VerticalSlash(30, 800)] * 3,
        VerticalSlash(1000, 6096),
    )
    assert row[28] == VerticalSlash(3500, 100)


def test_native_glm_ids_are_aliases() -> None:
    native = HeadPatterns.from_pretrained("THUDM/glm-4-9b-chat-1m-hf")
    assert native == HeadPatterns.from_pretrained("THUDM/glm-4-9b-chat-1m")
    assert "glm" in native.provenance.architectures


@pytest.mark.parametrize("table", [MIXED, EVERY_KIND], ids=["mixed", "every-kind"])
def test_save_and_read_back(table: HeadPatterns, tmp_path: Path) -> None:
    assert table.save(tmp_path) == tmp_path / FILE_NAME
    assert HeadPatterns.from_pretrained(tmp_path) == table
    assert HeadPatterns.from_pretrained(str(tmp_path / FILE_NAME)) == table
    assert [entry.name for entry in tmp_path.iterdir()] == [FILE_NAME]


def test_a_folder_may_call_its_table_as_the_documents_do(tmp_path: Path) -> None:
    MIXED.save(tmp_path / "patterns.json")
    assert HeadPatterns.from_pretrained(tmp_path) == HeadPatterns.from_file(tmp_path) == MIXED
    with pytest.raises(ValueError, match=r"no folder with head_patterns\.json or patterns\.json"):
        HeadPatterns.from_pretrained(tmp_path / "elsewhere")


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = MIXED.save(tmp_path / "table.json")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        EVERY_KIND.save(path)
    assert HeadPatterns.from_file(path) == MIXED
    assert [entry.name for entry in tmp_path.iterdir()] == ["table.json"]


def test_more_kinds_of_head_than_letters_still_round_trip(tmp_path: Path) -> None:
    table = HeadPatterns(tuple((VerticalSlash(i, 1), VerticalSlash(i, 2)) for i in range(200)))
    assert HeadPatterns.from_file(table.save(tmp_path)) == table


def test_published_layout_round_trip(tmp_path: Path) -> None:
    path = MIXED.to_upstream_json(tmp_path / "published.json")
    data = json.loads(path.read_text())
    assert data[0] == {"0": ["vertical_and_slash", 30, 800, 0.5], "1": ["stream_llm", 1, 2, 0]}
    assert HeadPatterns.from_upstream_json(path).patterns == MIXED.patterns
    assert HeadPatterns.from_pretrained(path).patterns == MIXED.patterns


def test_published_layout_is_read_as_written_by_others(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    layer = {str(head): ["vertical_and_slash", head, 800, 0.9] for head in (2, 0, 10, 1)}
    layer |= {str(head): ["block_sparse", 8, 1, 14994473] for head in range(3, 10)}
    path.write_text(json.dumps([layer]))
    table = HeadPatterns.from_upstream_json(path)
    assert [table[0][head] for head in (0, 1, 2, 10)] == [
        VerticalSlash(head, 800) for head in (0, 1, 2, 10)
    ]
    # the published program keeps 100 blocks whatever the file says
    assert set(table[0][3:10]) == {BlockSparse(100, 64)}
    assert table.scores is not None
    assert table.scores[0][9] == 14994473


def test_what_the_published_layout_cannot_hold_raises(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"layer 0, head 0: .* not dense; HeadPatterns.save"):
        EVERY_KIND.to_upstream_json(tmp_path / "x.json")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("[", "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        ("3", "expected an object or a list, got int"),
        ("[]", "expected a list with one object a layer"),
        ("[[1]]", "layer 0: expected an object of heads"),
        ('[{"1": ["stream_llm", 1, 2, 0]}]', "layer 0: expected the heads 0 to 0, got head '1'"),
        ('[{"0": ["stream_llm", 1]}]', "layer 0, head 0: expected"),
        ('[{"0": ["stream_lm", 1, 2, 0]}]', "layer 0, head 0: unknown kind 'stream_lm'"),
        ('[{"0": [["x"], 1, 2, 0]}]', "layer 0, head 0: unknown kind"),
        ('[{"0": ["stream_llm", -1, 2, 0]}]', r"layer 0, head 0: AShape.sink must be between 0"),
        ('[{"0": ["stream_llm", 1, NaN, 0]}]', r"AShape.local must be an int, got float nan"),
        ('[{"0": ["stream_llm", 1, 2, NaN]}]', "expected a finite score, got nan"),
        (
            '[{"0": ["stream_llm", 1, 2]}, {"0": ["stream_llm", 1, 2], "1": ["stream_llm", 1, 2]}]',
            "layer 1 has 2 heads, layer 0 has 1",
        ),
        ("{}", "expected the format 'minference.head_patterns/1', got None"),
    ],
)
def test_a_malformed_file_raises_one_error_that_names_it(
    data: str | bytes, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    with pytest.raises(PatternFileError, match=message) as caught:
        HeadPatterns.from_pretrained(path)
    assert "bad.json" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 3}, "rows must hold 3 strings of 2 letters; got 2"),
        ({"heads": 1}, "rows must hold 2 strings of 1 letters"),
        ({"rows": ["ab", "cz"]}, "row 1: letter 'z' is not in the legend"),
        ({"rows": "abcd"}, "rows must be a list"),
        ({"rows": [1, 2]}, "rows must hold strings"),
        ({"rows": []}, "rows must hold"),
        ({"legend": []}, "legend must be a dict"),
        ({"legend": {"a": {"kind": "vertical_slash", "vertical": 1}}}, "takes the fields"),
        ({"provenance": {"modle": "x"}}, "did you mean 'model'"),
        ({"provenance": {"recall": True}}, "provenance field 'recall' has the wrong type"),
        ({"provenance": {"aliases": [1]}}, "provenance field 'aliases' has the wrong type"),
        ({"scores": [[1, 2]]}, "scores must have 2 rows of 2"),
        ({"scores": [[1, 2], [3, "x"]]}, "a score must be a finite number or None, got 'x'"),
        ({"scores": 3}, "scores must be a list of rows"),
        ({"extra": 3}, "unknown field 'extra'"),
    ],
)
def test_a_malformed_table_of_our_own_raises(change: dict[str, Any], message: str) -> None:
    with pytest.raises(PatternFileError, match=message):
        HeadPatterns.from_dict(MIXED.to_dict() | change)


@pytest.mark.parametrize("name", ["legend", "rows", "layers", "heads", "format"])
def test_a_missing_field_is_named(name: str) -> None:
    data = MIXED.to_dict()
    del data[name]
    with pytest.raises(PatternFileError, match=name):
        HeadPatterns.from_dict(data)


def test_an_unknown_name_says_how_to_get_patterns(tmp_path: Path) -> None:
    for name in ("nobody/nothing", tmp_path, tmp_path / "no.json"):
        with pytest.raises(ValueError, match="minference search"):
            HeadPatterns.from_pretrained(name)
    with pytest.raises(FileNotFoundError, match="no pattern file"):
        HeadPatterns.from_file(tmp_path / "no.json")


def test_a_local_folder_named_like_a_model_decides_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my-Qwen2-7B-Instruct").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="no head patterns"):
        HeadPatterns.from_pretrained("my-Qwen2-7B-Instruct")


def test_for_shape_takes_the_only_table_that_fits() -> None:
    assert HeadPatterns.for_shape(40, 32, "glm").provenance.model == "THUDM/glm-4-9b-chat-1m"
    assert HeadPatterns.for_shape(48, 32, "llama").provenance.model == "01-ai/Yi-9B-200K"


@pytest.mark.parametrize(
    ("layers", "heads", "architecture"),
    [(3, 5, None), (32, 32, "llama"), (28, 28, "qwen2"), (80, 64, "qwen2"), (40, 32, "gemma2")],
    ids=["no table", "two tables", "three tables", "low recall", "other architecture"],
)
def test_for_shape_gives_the_default_when_it_would_guess(
    layers: int, heads: int, architecture: str | None
) -> None:
    table = HeadPatterns.for_shape(layers, heads, architecture)
    assert table == default_patterns(layers, heads)


def test_default_patterns() -> None:
    table = default_patterns(3, 5)
    assert table.counts() == {DEFAULT_PATTERN: 15}
    assert VerticalSlash(1000, 6096) == DEFAULT_PATTERN
    assert default_patterns(1, 2, Dense())[0] == (Dense(), Dense())
    with pytest.raises(ValueError, match="layers and heads must be at least 1"):
        default_patterns(0, 5)


def test_scaled_scales_every_head_and_drops_scores() -> None:
    scaled = MIXED.scaled(0.5)
    assert scaled[0] == (VerticalSlash(15, 400), AShape(1, 1))
    assert scaled.scores is None


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ((), ValueError, "at least one layer"),
        (((),), ValueError, "at least one layer"),
        (((Dense(),), (Dense(), Dense())), ValueError, "layer 1 has 2 heads, layer 0 has 1"),
        ((("dense",),), TypeError, "layer 0, head 0: expected a pattern"),
    ],
)
def test_a_table_that_is_no_rectangle_of_patterns_raises(
    rows: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        HeadPatterns(rows)


@given(
    st.lists(
        st.lists(
            st.one_of(
                st.builds(VerticalSlash, st.integers(0, 9), st.integers(1, 9)),
                st.builds(AShape, st.integers(0, 9), st.integers(1, 9)),
                st.builds(BlockSparse, st.integers(1, 9)),
            ),
            min_size=3,
            max_size=3,
        ),
        min_size=1,
        max_size=4,
    )
)
def test_the_schema_holds_any_table(rows: list[list[Pattern]]) -> None:
    table = HeadPatterns(tuple(tuple(row) for row in rows))
    assert HeadPatterns.from_dict(json.loads(json.dumps(table.to_dict()))) == table
