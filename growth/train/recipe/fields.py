"""What the parts of a recipe are made of: strict models, and the kinds of values in them."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from .errors import unknown_key


def _whole(value: object) -> object:
    return int(value) if isinstance(value, float) and value.is_integer() else value


# 1e9 is a float in YAML and what everyone writes for a number of tokens
Count = Annotated[int, BeforeValidator(_whole), Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
# a name is part of file names, of `--set name.key` and of metric names
Name = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]*$")]


class Strict(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, validate_default=True
    )

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, data: Any) -> Any:
        known = [field.alias or name for name, field in cls.model_fields.items()]
        for key in data if isinstance(data, dict) else ():
            if key not in known:
                raise unknown_key(key, known)
        return data
