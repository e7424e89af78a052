"""Sparse bytes behave like bytes."""

from hypothesis import given
from hypothesis import strategies as st

from devices.sparse import SparseBytes

SIZE = 64

offsets = st.integers(0, SIZE - 1)
changes = st.one_of(
    st.tuples(st.just("write"), offsets, st.binary(max_size=20)),
    st.tuples(st.just("fill"), offsets, st.tuples(st.integers(0, 20), st.integers(0, 255))),
    st.tuples(st.just("copy"), offsets, st.tuples(offsets, st.integers(0, 20))),
)


@given(st.lists(changes, max_size=30))
def test_any_history_reads_as_a_bytearray_would(history: list[tuple[str, int, object]]) -> None:
    sparse, plain = SparseBytes(), bytearray(SIZE)
    for change in history:
        match change:
            case ("write", int(offset), bytes(content)):
                content = content[: SIZE - offset]
                sparse.write(offset, content)
                plain[offset : offset + len(content)] = content
            case ("fill", int(offset), (int(size), int(byte))):
                size = min(size, SIZE - offset)
                sparse.fill(offset, size, byte)
                plain[offset : offset + size] = bytes([byte]) * size
            case ("copy", int(offset), (int(source), int(size))):
                size = min(size, SIZE - max(offset, source))
                sparse.copy_from(sparse, source_offset=source, offset=offset, size=size)
                plain[offset : offset + size] = bytes(plain[source : source + size])

        assert bytes(plain) == sparse.read(0, SIZE)

    assert bytes(plain[:10]) == sparse.clone(10).read(0, 10)


def test_a_hundred_gigabytes_cost_nothing_until_written() -> None:
    sparse = SparseBytes()
    sparse.fill(0, 100 << 30, 7)
    sparse.write(50 << 30, b"x")

    assert sparse.read((50 << 30) - 1, 3) == b"\x07x\x07"
