"""What bytes are before they are decoded: whole or cut off, their sizes, and the groups in which they are decoded."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dali_loaders.encoded import GROUP_PIXELS, groups


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), max_size=30), st.integers(1, 4000))
def test_groups_cover_a_batch_in_order_and_hold_no_more_than_allowed(sizes, most):
    sizes_b2 = np.array(sizes, np.int64).reshape(-1, 2)
    parts = groups(sizes_b2, most)
    assert [at for part in parts for at in range(part.start, part.stop)] == list(range(len(sizes)))
    held = [int(sizes_b2[part].prod(axis=1).sum()) for part in parts]
    for part, pixels in zip(parts, held, strict=True):
        assert part.stop > part.start and (pixels <= most or np.count_nonzero(sizes_b2[part].prod(axis=1)) == 1)
    # No two neighbours would have fitted into one.
    first = [next(pixels for pixels in sizes_b2[part].prod(axis=1).tolist() if pixels or part.stop == len(sizes)) for part in parts]
    assert all(pixels + following > most for pixels, following in zip(held, first[1:], strict=False))


def test_a_usual_batch_is_one_group_and_photos_are_several():
    assert groups(np.full((256, 2), 112)) == [slice(0, 256)]
    assert groups(np.full((256, 2), 512)) == [slice(0, 256)]
    assert len(groups(np.array([[6000, 8000]] * 4))) == 4
    assert len(groups(np.array([[3000, 4000]] * 16))) == 4
    assert GROUP_PIXELS >= 6000 * 8000
