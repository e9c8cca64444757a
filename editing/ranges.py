"""The numbers that a setting may take; pydantic refuses others when a config is read."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(gt=0, lt=1)]
Certainty = Annotated[float, Field(ge=0, lt=1)]  # a probability to be reached
Cosine = Annotated[float, Field(ge=-1, le=1)]
