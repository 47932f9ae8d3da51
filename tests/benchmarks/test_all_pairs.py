"""The benchmark of all pairs measures both kinds and says what it measured."""

from benchmarks.all_pairs import as_text, rows


def test_rows_name_rate_memory_and_error():
    pairs, near = rows(images=300, width=16, queries=20, gallery=500, k=3)
    assert 0 < pairs["score_error"] < 2e-6 and pairs["scores_per_second"] > 0 and pairs["peak_mib"] > 0
    assert "all pairs: 300 x 300 x 16" in as_text(pairs) and "neighbours: 20 x 500 x 16" in as_text(near)
    assert list(pairs) == list(near)
