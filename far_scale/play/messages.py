"""The messages between page and server, on one WebSocket a walk.

Up, JSON texts of at most 1 KB, unknown keys refused:

    {"type": "press", "action": 3}       a key goes down: one frame at least, and more while it is held
    {"type": "release", "action": 3}     it goes up; without `action` all do
    {"type": "run", "on": true}          frames also without keys (action 0, or the last label), or only with keys
    {"type": "back"}                     undo the last frame
    {"type": "reset"}                    back to the start
    {"type": "new"}                      the start of the next seed: another maze or episode
    {"type": "set", "steps": 8, "guidance": 1.5}      for the next frames; either may be left out

An action is a number from 0; of a model with labels it is the label, of one without conditions 0.

Down, JSON texts:

    {"type": "hello", ...}               once, first: what the model is and what its inputs are (`PlayServer`)
    {"type": "state", ...}               seed, run, steps, guidance, `idle` (action of a frame without a key); after
                                         each change
    {"type": "error", "message": "..."}  what was wrong with a message, or with a frame that could not be made
    {"type": "full", "message": "..."}   no session is free; the connection is then closed

and frames as binary messages:

    4 bytes                  length N of the header, little-endian
    N bytes                  header, JSON: `pictures` (bytes of each picture, model first, then the real engine; 0
                             for none), `frame`, `fps`, `model_ms`, `decoder_ms`, `engine_ms`, `cache_bytes`,
                             `recorded`, `steps_back`, `seed`
    the rest                 the pictures, PNG files
"""

from __future__ import annotations

import json
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter, ValidationError

from far_scale.data.shards.records import Count, Positive
from far_scale.play.walk import ShownFrame
from far_scale.utils.strict_model import StrictModel, first_problem

MAX_MESSAGE_BYTES = 1024


class Press(StrictModel):
    type: Literal["press"]
    action: Count


class Release(StrictModel):
    type: Literal["release"]
    action: Count | None = None


class Run(StrictModel):
    type: Literal["run"]
    on: bool


class Command(StrictModel):
    type: Literal["back", "reset", "new"]


class Set(StrictModel):
    type: Literal["set"]
    steps: Positive | None = None
    guidance: float | None = None


Message = Press | Release | Run | Command | Set

_MESSAGE: TypeAdapter[Message] = TypeAdapter(Annotated[Message, Field(discriminator="type")])


class BadMessage(Exception):
    """A message that is not in the protocol; the text says why."""


def parse_message(text: str) -> Message:
    """Parse a message from the page.

    Raises:
        BadMessage: it is none of the protocol's.
    """
    try:
        return _MESSAGE.validate_json(text)
    except ValidationError as error:
        raise BadMessage(f"not a message of this protocol: {first_problem(error)}") from None


def frame_message(frame: ShownFrame, fps: float, seed: int) -> bytes:
    """A frame as a binary message."""
    pictures = [frame.dream or b"", frame.engine or b""]
    header = json.dumps(
        {
            "frame": frame.index,
            "fps": round(fps, 2),
            "model_ms": round(frame.model_ms, 2),
            "decoder_ms": round(frame.decoder_ms, 2),
            "engine_ms": round(frame.engine_ms, 2),
            "cache_bytes": frame.cache_bytes,
            "recorded": frame.recorded,
            "steps_back": frame.steps_back,
            "seed": seed,
            "pictures": [len(picture) for picture in pictures],
        }
    ).encode()
    return len(header).to_bytes(4, "little") + header + b"".join(pictures)
