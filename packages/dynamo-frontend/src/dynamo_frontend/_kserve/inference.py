"""What an inference request means, whichever form it came in: inputs, parameters, and the completion they ask for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from dynamo_core.errors import InvalidRequestError, NotFoundError
from dynamo_frontend._openai.fields import CompletionRequest, explain

PLATFORM = "dynamo"
VERSION = "1"
INPUTS: tuple[tuple[str, str, list[int]], ...] = (
    ("text_input", "BYTES", [1]),
    ("input_ids", "INT64", [-1]),
    ("streaming", "BOOL", [1]),
)
"""Name, type and shape of what a text model takes: one of the first two, and optionally the third."""
OUTPUTS: tuple[tuple[str, str, list[int]], ...] = (("text_output", "BYTES", [-1]), ("finish_reason", "BYTES", [-1]))
"""The same of what it gives, one element a choice."""
_TYPES = {
    "text_input": frozenset({"BYTES"}),
    "input_ids": frozenset({"INT32", "INT64", "UINT32"}),
    "streaming": frozenset({"BOOL"}),
}
_OWN_PARAMETERS = frozenset({"streaming", "model", "prompt", "stream", "stream_options", "echo"})


@dataclass(slots=True)
class InputTensor:
    """One input, decoded to its elements."""

    name: str
    datatype: str
    shape: Sequence[int]
    data: Sequence[Any]


@dataclass(slots=True)
class InferCall:
    """A request of the protocol.

    Attributes:
        model: Model name.
        version: Asked version; empty for any.
        call_id: Caller's id; the response repeats it.
        parameters: Sampling fields of text completions by name.
        inputs: Tensors.
        outputs: Names of the outputs that are wanted; empty for all.
    """

    model: str
    version: str = ""
    call_id: str = ""
    parameters: dict[str, Any] = field(default_factory=dict[str, Any])
    inputs: list[InputTensor] = field(default_factory=list[InputTensor])
    outputs: list[str] = field(default_factory=list[str])

    @property
    def streaming(self) -> bool:
        """Whether the ``streaming`` input is true."""
        return any(bool(tensor.data[0]) for tensor in self.inputs if tensor.name == "streaming" and tensor.data)

    @property
    def final_marker(self) -> bool:
        """Whether the last response of a stream is to say that it is the last."""
        return bool(self.parameters.get("triton_enable_empty_final_response"))

    def completion(self, *, stream: bool) -> CompletionRequest:
        """Return the request as a text completion.

        Raises:
            InvalidRequestError: naming the input or parameter that is wrong.
            NotFoundError: for a version that is not served.
        """
        check_version(self.model, self.version)
        prompt = self._prompt()
        own = sorted(_OWN_PARAMETERS & set(self.parameters))
        if own:
            raise InvalidRequestError(f"The parameter {own[0]!r} is not one of sampling. Remove it.", param=own[0])
        for name in self.outputs:
            if name not in {output[0] for output in OUTPUTS}:
                raise InvalidRequestError(f"There is no output {name!r}; ask for text_output.", param="outputs")
        # Parameters of Triton's own are about its transport, not about what is generated.
        sampling = {name: value for name, value in self.parameters.items() if not name.startswith("triton_")}
        try:
            return msgspec.convert(
                {"model": self.model, "prompt": prompt, "stream": stream, **sampling}, CompletionRequest
            )
        except msgspec.ValidationError as error:
            raise explain(str(error)) from None

    def _prompt(self) -> str | list[int]:
        tensors: dict[str, InputTensor] = {}
        for tensor in self.inputs:
            _check_tensor(tensor, tensors)
            tensors[tensor.name] = tensor
        given = [name for name in ("text_input", "input_ids") if name in tensors]
        if len(given) != 1:
            raise InvalidRequestError("Give one of the inputs text_input and input_ids.", param="inputs")
        data = tensors[given[0]].data
        return _as_text(data[0]) if given[0] == "text_input" else [_as_token(token) for token in data]


def check_version(model: str, version: str) -> None:
    """Refuse a version that is not served.

    Raises:
        NotFoundError: naming it.
    """
    if version not in ("", VERSION):
        raise NotFoundError(
            f"The model '{model}' has no version '{version}'; leave it out or ask for '{VERSION}'.",
            reason="model_not_found",
            param="model_version",
        )


def _check_tensor(tensor: InputTensor, known: dict[str, InputTensor]) -> None:
    types = _TYPES.get(tensor.name)
    if types is None:
        offered = ", ".join(name for name, _, _ in INPUTS)
        raise InvalidRequestError(f"There is no input {tensor.name[:100]!r}; the inputs are {offered}.", param="inputs")
    if tensor.name in known:
        raise InvalidRequestError(f"The input {tensor.name} is given twice; give it once.", param=tensor.name)
    if tensor.datatype not in types:
        raise InvalidRequestError(
            f"The input {tensor.name} has type {tensor.datatype!r}; send {' or '.join(sorted(types))}.",
            param=tensor.name,
        )
    elements = 1
    for size in tensor.shape:
        elements *= size
    if elements != len(tensor.data) or any(size < 0 for size in tensor.shape):
        raise InvalidRequestError(
            f"The input {tensor.name} has {len(tensor.data)} elements but the shape {list(tensor.shape)}.",
            param=tensor.name,
        )
    one = tensor.name != "input_ids"
    if (
        not elements
        or (one and elements != 1)
        or len(tensor.shape) > 2
        or (len(tensor.shape) == 2 and tensor.shape[0] != 1)
    ):
        wanted = "[1]" if one else "[tokens]"
        raise InvalidRequestError(
            f"The input {tensor.name} has the shape {list(tensor.shape)}; send {wanted}.", param=tensor.name
        )


def _as_text(value: Any) -> str:
    if isinstance(value, str):
        return value
    try:
        if isinstance(value, bytes):
            return value.decode("utf-8")
    except UnicodeDecodeError:
        pass
    raise InvalidRequestError("The input text_input is not text in UTF-8.", param="text_input")


def _as_token(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise InvalidRequestError("The input input_ids has an element that is no whole number.", param="input_ids")
