import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mlx_esm_hf.data.windows import Window, blend, cut_windows, ramp

LENGTHS = st.integers(1, 300)


@given(LENGTHS, st.integers(1, 60))
def test_windows_cover_all_and_overlap_by_half(length, longest):
    windows = cut_windows(7, length, longest)
    assert all(window.sequence == 7 and 0 < window.length <= longest for window in windows)
    assert set().union(*(range(window.start, window.stop) for window in windows)) == set(range(length))
    for a, b in zip(windows, windows[1:], strict=False):
        assert a.stop - b.start >= longest // 2


def test_short_sequence_is_one_window():
    assert cut_windows(0, 30, 30) == cut_windows(0, 30, None) == [Window(0, 0, 30)]
    assert len(cut_windows(0, 31, 30)) == 2


@given(LENGTHS, st.integers(1, 60))
def test_blending_windows_restores_the_array(length, longest):
    array = np.random.default_rng(length).normal(size=(length, 3)).astype(np.float32)
    parts = [(window, array[window.start : window.stop]) for window in cut_windows(0, length, longest)]
    np.testing.assert_allclose(blend(parts, length), array, rtol=1e-5, atol=1e-6)


def test_weights_taper_at_inner_edges_only():
    assert ramp(Window(0, 0, 4), 4).tolist() == [4, 4, 4, 4]
    assert ramp(Window(0, 0, 4), 6).tolist() == [4, 3, 2, 1]
    assert ramp(Window(0, 2, 6), 6).tolist() == [1, 2, 3, 4]
    assert ramp(Window(0, 1, 5), 6).tolist() == [1, 2, 2, 1]
