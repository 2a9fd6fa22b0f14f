import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_core.errors import BackendProtocolError
from dynamo_worker._openai_http import _wire
from dynamo_worker._openai_http._server import Samples
from dynamo_worker._openai_http._wire import SseDecoder, token_of


@given(st.lists(st.binary(min_size=1, max_size=9).filter(lambda b: b"\n" not in b and b"\r" not in b)), st.data())
def test_events_do_not_depend_on_how_bytes_arrive(events: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(b": ping\n\ndata: " + event + b"\r\n\r\n" for event in events)
    decoder, found = SseDecoder(), []
    while stream:
        size = data.draw(st.integers(1, len(stream)))
        found += decoder.feed(stream[:size])
        stream = stream[size:]
    assert found == [event.removeprefix(b"") for event in events]


def test_lines_of_one_event_are_joined() -> None:
    assert SseDecoder().feed(b"data: a\ndata:b\n\n") == [b"a\nb"]


def test_an_endless_event_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_wire, "MAX_EVENT_BYTES", 10)
    with pytest.raises(BackendProtocolError, match="exceeds 10 bytes"):
        SseDecoder().feed(b"data: 12345678901")


@pytest.mark.parametrize(("text", "token"), [("token_id:12", 12), (" word", None), ("token_id:x", None), ("12", None)])
def test_token_names(text: str, token: int | None) -> None:
    assert token_of(text) == token


def test_samples_are_summed_over_label_sets() -> None:
    samples = Samples.parse('a{x="1"} 2\n# TYPE a gauge\na{x="2"} 3.5\nb NaN\nnot a sample\n')
    assert samples.first("none", "a") == 5.5
    assert samples.labels["a"] == {"x": "2"}
