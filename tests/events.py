"""Read the files that TensorBoard reads."""

from pathlib import Path


def events(folder: Path) -> dict[tuple[str, int], float]:
    """The numbers of all files in a folder, by tag and step; each stands there once, and every checksum is right."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c

    found = {}
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:  # length, its checksum, a record, its checksum
            length = int.from_bytes(data[:8], "little")
            record = data[12 : 12 + length]
            assert int.from_bytes(data[12 + length : 16 + length], "little") == masked_crc32c(record)
            event = Event.FromString(record)
            for value in event.summary.value:
                assert (value.tag, event.step) not in found
                found[value.tag, event.step] = value.simple_value
            data = data[16 + length :]
    return found
