"""The benchmark of protocols draws sets in the real layouts, and says what it measured."""

from benchmarks.protocols import as_text, rows


def test_rows_name_time_and_memory():
    ijbc = {"subjects": 20, "templates": 70, "images": 300, "pairs": 900}
    mega = {"identities": 4, "probes": 20, "distractors": 300, "noisy_probes": 3, "noisy_distractors": 5}
    templates, faces = rows(ijbc, mega, width=16)
    assert templates["genuine_pairs"] >= 50 and templates["genuine_pairs"] + templates["impostor_pairs"] == 900
    assert (faces["genuine_pairs"], faces["impostor_pairs"]) == (40, 6000)
    assert list(templates) == list(faces) and templates["peak_mib"] > 0
    assert "IJB-C (subjects=20, templates=70" in as_text(templates)
