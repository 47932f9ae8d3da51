"""Copies by a hash of the bytes."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dali_loaders.checking.duplicates import copies, digest


@given(st.lists(st.integers(0, 12), max_size=40), st.integers(0, 3))
def test_groups_are_those_of_equal_contents(contents, step):
    images_n = np.arange(len(contents)) * (step + 1)  # some images between are unreadable
    digests_n2 = np.array([digest(b"image %d" % content) for content in contents], np.uint64).reshape(-1, 2)
    expected = {}
    for image, content in zip(images_n.tolist(), contents, strict=True):
        expected.setdefault(content, []).append(image)
    assert [group.tolist() for group in copies(digests_n2, images_n)] == [group for group in expected.values() if len(group) > 1]


def test_both_halves_of_a_hash_count():
    digests_n2 = np.array([[1, 2], [1, 3], [4, 2], [1, 2]], np.uint64)
    assert [group.tolist() for group in copies(digests_n2, np.arange(4))] == [[0, 3]]
