"""Is every NaN and infinity found, wherever it is and whatever surrounds it, and nothing else?"""

from collections.abc import Iterator

import pytest
import torch
from nsa_routing.device_flag import Alarm
from nsa_routing.finiteness import all_finite, each_once, inputs_finite, largest_of, result_finite

INF, NAN = torch.inf, torch.nan
HALF, BF16, SINGLE, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64


@pytest.mark.parametrize("dtype", [HALF, BF16, SINGLE, DOUBLE], ids=str)
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("place", [0, 7, 23])
def test_one_bad_element_is_enough(place: int, value: float, dtype: torch.dtype) -> None:
    x = torch.linspace(-3, 3, 24, dtype=dtype).reshape(2, 3, 4)
    assert all_finite((x,)).item() is True
    x.view(-1)[place] = value
    assert all_finite((x,)).item() is False
    assert all_finite((torch.ones(2), x, torch.ones(2))).item() is False
    assert all_finite((x.transpose(0, 2),)).item() is False


@pytest.mark.parametrize("dtype", [HALF, BF16, SINGLE, DOUBLE], ids=str)
def test_the_largest_numbers_are_finite(dtype: torch.dtype) -> None:
    """A norm that squared or summed them would say otherwise."""
    x = torch.full((300,), torch.finfo(dtype).max, dtype=dtype)
    assert all_finite((x, -x)).item() is True


def test_a_nan_beside_an_infinity() -> None:
    assert all_finite((torch.tensor([INF, NAN, -INF]),)).item() is False
    lse = torch.tensor([[-INF, NAN]])
    assert result_finite((torch.ones(2, 1, 1), lse)).item() is False
    assert result_finite((torch.ones(2, 1, 1), lse.flip(1))).item() is False


def test_what_cannot_be_judged() -> None:
    assert all_finite(()) is None
    assert all_finite((torch.zeros(3, dtype=torch.int32), torch.zeros(0, 4))) is None
    assert result_finite(torch.full((2, 1, 3), -1, dtype=torch.int32)) is None
    assert result_finite((torch.zeros(0, 2, 4), torch.zeros(2, 0))) is None


@pytest.mark.parametrize("lse, finite", [(-INF, True), (INF, False), (NAN, False), (3e38, True), (0.0, True)], ids=str)
def test_an_lse_may_be_minus_infinity(lse: float, finite: bool) -> None:
    lse_of_all = torch.zeros(2, 3)
    lse_of_all[1, 1] = lse
    assert result_finite((torch.ones(3, 2, 4), lse_of_all)).item() is finite
    assert result_finite((torch.ones(3, 2, 4), torch.full((2, 3), -INF))).item() is True, "no query sees a key"


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_an_out_may_not(value: float) -> None:
    assert result_finite((torch.full((3, 2, 4), value), torch.zeros(2, 3))).item() is False
    assert result_finite(torch.full((3, 2, 4), value)).item() is False


def up(result: object) -> bool:
    alarm = Alarm()
    alarm.look(largest_of(result))
    assert alarm.noted(wait=True) is alarm.noted(wait=False)
    return alarm.noted(wait=True)


@pytest.mark.parametrize("dtype", [HALF, BF16, SINGLE, DOUBLE], ids=str)
@pytest.mark.parametrize("value", [NAN, INF, -INF, 0.0, None], ids=str)
def test_an_alarm_is_up_just_if_a_result_is_not_finite(value: float | None, dtype: torch.dtype) -> None:
    out, lse = torch.zeros(3, 2, 4, dtype=dtype), torch.zeros(2, 3)
    lse[0, 1] = -INF
    for x, allowed in ((out, ()), (lse, (-INF,))):
        kept = x.clone()
        x[1, 1] = torch.finfo(x.dtype).max if value is None else value
        for result in ((out, lse), (out, torch.full((2,), -1)), out):
            assert up(result) is not result_finite(result).item()
        assert up((out, lse)) is not (value in (0.0, None, *allowed))
        x.copy_(kept)
    assert not up((torch.zeros(0, 2, 4), torch.zeros(2, 0)))
    assert not up(torch.zeros(3, dtype=torch.int32))


def test_an_alarm_stays_up_until_it_is_lowered_in_any_mode() -> None:
    alarm = Alarm()
    with torch.inference_mode():
        alarm.look(largest_of(torch.ones(3)))
    assert not alarm.noted(wait=True)
    with torch.inference_mode():
        bad = torch.tensor([NAN])
    for x in (bad, torch.ones(2, requires_grad=True) * 2, torch.tensor([INF]), torch.zeros(1, dtype=HALF)):
        alarm.look(largest_of(x))
        assert alarm.noted(wait=True)
    flag = alarm.flag
    alarm.lower()
    assert not alarm.noted(wait=True)
    assert alarm.flag is flag, "graphs hold it"
    assert not flag.requires_grad


def test_news_of_an_alarm_is_sent_now_and_then_and_never_in_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """`mirror` stands for the host's copy."""
    from nsa_routing import device_flag

    alarm = Alarm()
    alarm.flag, alarm.mirror = torch.zeros((), dtype=DOUBLE), torch.zeros((), dtype=DOUBLE)
    alarm.look([torch.tensor(1.0)])
    assert alarm.mirror.item() == 1.0, "the first call's"
    monkeypatch.setattr(device_flag, "capturing", lambda device: True)
    for _ in range(2 * Alarm.SENT_EVERY):
        alarm.look([torch.tensor(NAN)])
    assert not alarm.noted(wait=False)
    monkeypatch.undo()
    late = 0
    while not alarm.noted(wait=False):
        alarm.look([torch.tensor(2.0)])
        late += 1
    assert late == Alarm.SENT_EVERY
    alarm.lower()
    alarm.flag.fill_(INF)
    assert [alarm.noted(wait=wait) for wait in (False, True, False)] == [False, True, True], "who waits tells all"


def test_inputs_are_the_tensors_among_the_arguments() -> None:
    class Pages:
        pages = torch.full((2,), NAN)

    x, indices = torch.ones(3), torch.zeros(3, dtype=torch.int32)
    assert inputs_finite((x, Pages(), indices, "layout", None)).item() is True
    assert inputs_finite((x, torch.tensor([NAN]))).item() is False
    assert inputs_finite((Pages(), "layout")) is None


@pytest.mark.parametrize("bad", [None, "x", "y", "ring"])
def test_an_argument_may_say_which_tensors_are_its_own(bad: str | None) -> None:
    """As rows do that an operation is to store: theirs count, those of a ring do not."""

    class Rows:
        x, y, ring = (torch.full((2,), NAN if name == bad else 1.0) for name in ("x", "y", "ring"))

        def tensors(self) -> Iterator[torch.Tensor]:
            yield from (self.x, self.y)

    class Odd:
        tensors = None

    assert inputs_finite((torch.ones(3), Rows(), Odd(), "layout")).item() is (bad in (None, "ring"))
    assert inputs_finite((Rows(),)).item() is (bad in (None, "ring"))
    assert inputs_finite((Odd(),)) is None


def test_a_verdict_records_no_gradient() -> None:
    x = torch.ones(3, 1, 2, requires_grad=True)
    for verdict in (all_finite((x,)), result_finite((x * 2, torch.zeros(1, 3))), inputs_finite((x,))):
        assert not verdict.requires_grad
        assert verdict.dtype == torch.bool
        assert verdict.ndim == 0


@pytest.fixture
def looked_at(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the tensors that were read from memory."""
    sizes: list[int] = []
    norm = torch.linalg.vector_norm

    def noted(x: torch.Tensor, *args: object) -> torch.Tensor:
        sizes.append(x.numel())
        return norm(x, *args)

    monkeypatch.setattr(torch.linalg, "vector_norm", noted)
    return sizes


def test_a_tensor_is_each_once_within_and_anew_without(looked_at: list[int]) -> None:
    q, out = torch.ones(3), torch.ones(4)
    with each_once():
        assert result_finite((out, torch.zeros(1, 4))).item() is True
        assert inputs_finite((q, out)).item() is True
        assert inputs_finite((out, q)).item() is True
    assert sorted(looked_at) == [3, 4]
    q[0] = NAN
    assert inputs_finite((q,)).item() is False
    with each_once():
        assert inputs_finite((q,)).item() is False
        assert inputs_finite((torch.ones(3),)).item() is True, "another tensor"
    assert len(looked_at) == 5


def test_what_is_judged_stays_alive_so_that_no_other_takes_its_place(looked_at: list[int]) -> None:
    with each_once():
        for value in (1.0, NAN, 1.0, INF):
            finite = inputs_finite((torch.full((5,), value),))  # freed at once, its place may be the next one's
            assert finite.item() is (value == 1.0)
    assert len(looked_at) == 4


def test_looking_once_may_be_nested(looked_at: list[int]) -> None:
    q = torch.ones(3)
    with each_once():
        inputs_finite((q,))
        with each_once():
            inputs_finite((q,))
        inputs_finite((q,))
    assert len(looked_at) == 1
