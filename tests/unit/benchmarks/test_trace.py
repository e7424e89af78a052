"""Which requests of a trace a run sends, and what is said about a trace that cannot be used."""

import gzip
from pathlib import Path

import pytest

from benchmarks.trace import Row, TraceError, busiest, plan, read

HEADER = "t_s,model,input_tokens,output_tokens\n"


def row(t_s: float, model: str = "a", *, output_tokens: int = 10) -> Row:
    return Row(t_s=t_s, model=model, input_tokens=100, output_tokens=output_tokens)


@pytest.mark.parametrize("suffix", [".csv", ".csv.gz"])
def test_plain_and_gzipped_files_are_read_alike_and_other_columns_are_ignored(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"trace{suffix}"
    text = "note," + HEADER + "x,5.25,m1,237,14\ny,6.5,m2,1,2\n"
    path.write_bytes(gzip.compress(text.encode()) if suffix.endswith("gz") else text.encode())

    assert [
        Row(t_s=5.25, model="m1", input_tokens=237, output_tokens=14),
        Row(t_s=6.5, model="m2", input_tokens=1, output_tokens=2),
    ] == read(path)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "has no column 't_s'; it has nothing"),
        ("t_s,service,input_tokens,output_tokens\n", "has no column 'model'; it has t_s, service, input_tokens"),
        (HEADER + "1,m,2,3\n1,m,many,3\n", "trace.csv, line 3: input_tokens is 'many', not a number"),
        (HEADER + "1,m,2\n", "line 2: output_tokens is '', not a number"),
        (HEADER + "-1,m,2,3\n", "line 2: t_s is -1, not a number from 0 on"),
        (HEADER + "nan,m,2,3\n", "line 2: t_s is nan, not a number from 0 on"),
        (HEADER + "1,,2,3\n", "line 2: model is empty"),
    ],
)
def test_a_trace_that_cannot_be_used_is_one_sentence_with_its_place(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(text)

    with pytest.raises(TraceError, match=r"^[^\n]*$") as raised:
        read(path)

    assert sentence in str(raised.value)


@pytest.mark.parametrize("content", [b"\x1f\x8b no gzip", b"\xff\xfe\x00", gzip.compress(b"t_s,model")[:12]])
def test_a_file_of_another_kind_is_told(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "trace.csv"
    path.write_bytes(content)

    with pytest.raises(TraceError, match=r"trace\.csv"):
        read(path)


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="cannot be read: No such file"):
        read(tmp_path / "none.csv")


def test_the_busiest_models_are_taken_ties_by_name() -> None:
    rows = [row(0, "c"), row(1, "b"), row(2, "a"), row(3, "d"), row(4, "d")]

    assert ["a", "d"] == busiest(rows, 2)
    with pytest.raises(TraceError, match="has 4 models, and 5 were asked for"):
        busiest(rows, 5)


def test_a_plan_is_every_nth_request_from_the_start_on_with_its_time_divided() -> None:
    rows = [row(float(second), output_tokens=second) for second in range(100)]

    planned = plan(rows, models=["a"], start_s=10, speed=5, every=10, output_tokens_max=64, length_s=10)

    assert [0.0, 2.0, 4.0, 6.0, 8.0] == [request.due_s for request in planned]
    assert [10, 20, 30, 40, 50] == [request.output_tokens for request in planned]


def test_answers_are_cut_and_never_empty() -> None:
    rows = [row(0, output_tokens=500), row(1, output_tokens=0)]

    planned = plan(rows, models=["a"], start_s=0, speed=1, every=1, output_tokens_max=64, length_s=10)

    assert [64, 1] == [request.output_tokens for request in planned]


def test_the_same_requests_are_sent_whatever_other_models_are_left_out() -> None:
    rows = [row(0, "a"), row(1, "b"), row(2, "a"), row(3, "b")]

    def times(models: list[str]) -> list[float]:
        planned = plan(rows, models=models, start_s=0, speed=1, every=2, output_tokens_max=64, length_s=10)
        return [request.due_s for request in planned if request.model == "a"]

    assert times(["a", "b"]) == times(["a"]) == [0.0, 2.0]
