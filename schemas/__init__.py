"""The vocabulary: every message that crosses a process boundary, as msgspec types. Imports nothing of ours."""
