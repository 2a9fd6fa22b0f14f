"""A session of the stock ``tritonclient``: ``python triton_session.py HOST:PORT MODEL`` prints what passed."""

from __future__ import annotations

import queue
import sys
from importlib import metadata
from typing import Any

import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

PROMPT = b"In the beginning"


class Session:
    """The steps, in order.

    Args:
        client: The client.
        model: Model name.
    """

    def __init__(self, client: Any, model: str) -> None:
        self._client = client
        self._model = model

    def health(self) -> None:
        """Server and model are up, and an unknown model is not."""
        assert self._client.is_server_live()
        assert self._client.is_server_ready()
        assert self._client.is_model_ready(self._model)
        assert not self._client.is_model_ready("nobody")

    def metadata(self) -> None:
        """What the model takes and gives."""
        shown = self._client.get_model_metadata(self._model)
        assert [tensor.name for tensor in shown.inputs] == ["text_input", "input_ids", "streaming"]
        config = self._client.get_model_config(self._model, as_json=True)["config"]
        assert config["model_transaction_policy"]["decoupled"]

    def infer(self) -> None:
        """Text and token ids, answered whole."""
        options = {"max_tokens": 8, "temperature": 0, "ignore_eos": True}
        whole = self._client.infer(self._model, [_text()], request_id="mine", parameters=options)
        assert whole.get_response().id == "mine"
        assert whole.as_numpy("text_output")[0]
        assert whole.as_numpy("finish_reason").tolist() == [b"length"]
        ids = triton.InferInput("input_ids", [3], "INT64")
        ids.set_data_from_numpy(np.array([5, 6, 7], dtype=np.int64))
        several = self._client.infer(self._model, [ids], parameters={"max_tokens": 2, "n": 2, "ignore_eos": True})
        assert len(several.as_numpy("text_output")) == 2

    def stream(self) -> None:
        """The same text in pieces, the last one marked."""
        options = {"max_tokens": 8, "temperature": 0, "ignore_eos": True}
        whole = self._client.infer(self._model, [_text()], parameters=options).as_numpy("text_output")[0]
        answers: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
        flag = triton.InferInput("streaming", [1], "BOOL")
        flag.set_data_from_numpy(np.array([True], dtype=np.bool_))

        def note(result: Any, error: Any) -> None:
            answers.put((result, error))

        self._client.start_stream(note)
        self._client.async_stream_infer(
            self._model, [_text(), flag], parameters=options, enable_empty_final_response=True
        )
        pieces: list[bytes] = []
        last = False
        while not last:
            result, error = answers.get(timeout=30)
            assert error is None, error
            pieces.append(result.as_numpy("text_output")[0])
            last = result.get_response().parameters["triton_final_response"].bool_param
        self._client.stop_stream()
        assert b"".join(pieces) == whole
        assert len(pieces) > 1

    def errors(self) -> None:
        """Typed errors that name what is wrong."""
        for model, parameters, named in (("nobody", {}, "nobody"), (self._model, {"temprature": 1}, "temprature")):
            try:
                self._client.infer(model, [_text()], parameters=parameters)
            except InferenceServerException as error:
                assert named in str(error), error
            else:
                raise AssertionError(f"{named} was not refused")


def _text() -> Any:
    text = triton.InferInput("text_input", [1], "BYTES")
    text.set_data_from_numpy(np.array([PROMPT], dtype=np.object_))
    return text


STEPS = ("health", "metadata", "infer", "stream", "errors")


def main(address: str, model: str) -> None:
    """Run the session."""
    print(f"tritonclient {metadata.version('tritonclient')}")
    with triton.InferenceServerClient(address) as client:
        session = Session(client, model)
        for step in STEPS:
            getattr(session, step)()
            print(f"passed {step}")


if __name__ == "__main__":
    main(*sys.argv[1:3])
