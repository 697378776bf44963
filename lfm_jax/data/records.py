"""``tf.train.Example`` on the wire, by hand: the record format that TFDS reads and writes.

An example is a map from feature name to a list of byte strings or of int64. With protobuf's
message classes a 16 KiB record costs more to parse than to read; the few fields that are there are
walked here directly.

    Example  { Features features = 1 }
    Features { repeated Entry feature = 1 },  Entry { string key = 1; Feature value = 2 }
    Feature  { BytesList bytes_list = 1 | Int64List int64_list = 3 },  each { repeated value = 1 }
"""

from collections.abc import Iterator, Mapping
from typing import Any

Value = memoryview | int


class RecordError(ValueError):
    """Bytes that are not an example of single byte strings and integers."""


def encode_example(features: Mapping[str, bytes | int]) -> bytes:
    """One record from byte strings (arrays) and integers (scalars), keys in the given order."""
    entries = []
    for name, value in features.items():
        if isinstance(value, int):
            # A packed list of one varint; negative ones are 64-bit two's complement.
            feature = _field(3, _field(1, _varint(value & ((1 << 64) - 1))))
        else:
            feature = _field(1, _field(1, value))
        entries.append(_field(1, _field(1, name.encode()) + _field(2, feature)))
    return _field(1, b"".join(entries))


def parse_example(record: bytes) -> dict[str, Value]:
    """The features of a record; byte strings as views into it.

    Raises:
        RecordError: not such a record.
    """
    try:
        return _parse(memoryview(record))
    except (IndexError, UnicodeDecodeError) as error:
        raise RecordError(f"malformed record ({error})") from None


def _parse(record: memoryview) -> dict[str, Value]:
    features: dict[str, Value] = {}
    for number, kind, body in _fields(record):
        _expect(number == 1 and kind == 2, "Example")
        for number, kind, entry in _fields(body):
            _expect(number == 1 and kind == 2, "Features")
            name, value = "", None
            for number, kind, field in _fields(entry):
                _expect(kind == 2, "feature entry")
                if number == 1:
                    name = str(field, "utf-8")
                elif number == 2:
                    value = _feature(field)
            if value is None:
                raise RecordError("malformed record (feature)")
            features[name] = value
    return features


def _feature(feature: memoryview) -> Value | None:
    value = None
    for number, kind, body in _fields(feature):
        _expect(kind == 2 and number in (1, 3), "feature kind (bytes or int64)")
        for inner, inner_kind, item in _fields(body):
            _expect(inner == 1 and value is None, "list of one value")
            if number == 1:
                _expect(inner_kind == 2, "byte string")
                value = item
            elif inner_kind == 2:
                integer, end = _read_varint(item, 0)
                _expect(end == len(item), "list of one value")
                value = _signed(integer)
            else:
                _expect(inner_kind == 0, "integer")
                value = _signed(item)
    return value


def _fields(data: memoryview) -> Iterator[tuple[int, int, Any]]:
    """(field number, wire type, content) of each field of a message."""
    position, end = 0, len(data)
    while position < end:
        tag, position = _read_varint(data, position)
        kind = tag & 7
        if kind == 2:
            length, position = _read_varint(data, position)
            _expect(length <= end - position, "length")
            yield tag >> 3, kind, data[position : position + length]
            position += length
        elif kind == 0:
            value, position = _read_varint(data, position)
            yield tag >> 3, kind, value
        else:
            raise RecordError(f"malformed record (wire type {kind})")


def _read_varint(data: memoryview, position: int) -> tuple[int, int]:
    byte = data[position]
    if byte < 0x80:
        return byte, position + 1
    value, shift = byte & 0x7F, 7
    while True:
        position += 1
        byte = data[position]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & ((1 << 64) - 1), position + 1
        shift += 7
        _expect(shift < 70, "integer")


def _field(number: int, body: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(body)) + body


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _expect(condition: bool, what: str) -> None:
    if not condition:
        raise RecordError(f"malformed record ({what})")
