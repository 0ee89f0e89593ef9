"""Nothing that was trained on is evaluated on."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data import splits

CONTENTS = st.lists(st.binary(min_size=0, max_size=2), max_size=60)


@given(CONTENTS, st.floats(0, 1))
def test_equal_content_never_lands_on_both_sides(contents: list[bytes], fraction: float) -> None:
    keys = splits.content_keys(contents)
    kept, held = splits.hold_out(keys, fraction)
    assert sorted([*kept, *held]) == list(range(len(contents)))
    assert not {contents[i] for i in kept} & {contents[i] for i in held}
    assert len({contents[i] for i in held}) == round(fraction * len(set(contents)))


@given(CONTENTS, st.floats(0, 1), st.randoms(use_true_random=False))
def test_the_split_ignores_the_order_of_files(contents: list[bytes], fraction: float, random: object) -> None:
    shuffled = list(contents)
    random.shuffle(shuffled)  # type: ignore[attr-defined]

    def held(listed: list[bytes]) -> set[bytes]:
        return {listed[i] for i in splits.hold_out(splits.content_keys(listed), fraction)[1]}

    assert held(contents) == held(shuffled)


def test_what_is_evaluated_on_ignores_the_seed() -> None:
    everything = np.arange(100, 300)
    for split in ("eval", "select"):
        assert np.array_equal(
            splits.subset(everything, split, 20, seed=1), splits.subset(everything, split, 20, seed=2)
        )
    for split in ("train", "calibration"):
        first, second = (splits.subset(everything, split, 20, seed=seed) for seed in (1, 2))
        assert len(first) == 20 and not np.array_equal(first, second)
        assert set(first) <= set(everything) and list(first) == sorted(set(first))
    assert np.array_equal(splits.subset(everything, "train", 500, seed=1), everything)
