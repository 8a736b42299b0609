"""What clients send: the part of OpenAI's requests that this server supports. A parameter that would change an answer and is
not supported is refused, never ignored."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

MAX_TOP_LOGPROBS = 20
MAX_STOPS = 16


class ApiError(Exception):
    """An error, answered in OpenAI's form.

    Args:
        status: the HTTP status. message: one sentence. code: a name for programs. param: the parameter that was wrong.
    """

    def __init__(self, status: int, message: str, code: str, param: str | None = None):
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param

    def body(self) -> dict[str, Any]:
        """JSON values."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class StreamOptions(_Strict):
    """Options of a stream."""

    include_usage: bool = False


class _Sampled(_Strict):
    """The parameters that both kinds of completion share."""

    model: str | None = None  # OpenAI wants it; here there is only one
    n: Annotated[int, Field(ge=1, le=16)] = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    seed: int | None = None
    stop: str | Annotated[list[str], Field(max_length=MAX_STOPS)] | None = None
    presence_penalty: Literal[0] | None = None
    frequency_penalty: Literal[0] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    user: str | None = None

    def stops(self) -> list[str]:
        """The strings that end an answer."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    def sampling(self) -> dict[str, float | int]:
        """The settings of `Sampling` that the client gave; with a temperature of 0 the others are left out."""
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        if given.get("top_k") == 0:  # what several clients send for: all of them
            del given["top_k"]
        if self.temperature == 0:
            return {name: value for name, value in given.items() if name in ("temperature", "repetition_penalty")}
        return given


class TextPart(_Strict):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(_Strict):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """Role and text of the message, as chat templates expect them."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class TextFormat(_Strict):
    """The only form of answers."""

    type: Literal["text"] = "text"


class ChatRequest(_Sampled):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    response_format: TextFormat | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    metadata: dict[str, str] | None = None
    store: Literal[False] | None = None

    def recorded(self) -> int | None:
        """How many of the likeliest tokens are wanted for each token; None: no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None


class TextRequest(_Sampled):
    """POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    suffix: None = None

    def prompts(self) -> list[str | list[int]]:
        """Each prompt, a text or token ids."""
        prompt = self.prompt
        if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
            return [prompt]  # type: ignore[list-item]
        return list(prompt)  # type: ignore[arg-type]

    def recorded(self) -> int | None:
        """As `ChatRequest.recorded`."""
        return self.logprobs


class PredictRequest(_Strict):
    """POST /predict."""

    rows: Annotated[list[Any], Field(min_length=1)]  # what a row may be is `row_texts`' to say
    max_new_tokens: Annotated[int, Field(ge=1)] | None = None
