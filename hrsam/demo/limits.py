"""Every limit of the click page's server, in one place, each with its reason."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1 << 20


@dataclass(frozen=True)
class Limits:
    """Sizes in bytes, times in seconds."""

    upload_bytes: int = 512 * MIB
    """A 30,000 x 30,000 JPEG of good quality has 280 MiB."""
    folder_bytes: int = 2048 * MIB
    """Of a file in the opened folder, which the person at the machine chose; it is held once while it is decoded."""
    given_bytes: int = 32 * MIB
    """A mask as PNG: a noisy one of 4096 x 4096 takes 2 MiB, a plain one of 30,000 x 30,000 four."""
    json_bytes: int = 64 * 1024
    """A request body that is JSON names one picture."""
    message_bytes: int = 1 * MIB
    """A WebSocket message: clicks take 100 bytes, the run lengths of a given mask some 100 KiB."""
    header_bytes: int = 16 * 1024
    """Request line and headers; browsers send about 1 KiB."""
    chunk_seconds: float = 15.0
    """Between two pieces of a body; who is slower holds a connection for nothing."""
    upload_seconds: float = 600.0
    """For a whole body: 512 MiB at 1 MiB/s."""
    connections: int = 300
    """Open at once: a browser tab takes up to seven, so some forty tabs."""
    messages_per_second: float = 50.0
    """A person clicks five times a second at most; a held undo key repeats thirty times."""
    message_burst: int = 200
    """Messages that may come at once, after a reconnect for instance."""
    refused_in_a_row: int = 1000
    """Messages over the rate after which the connection is closed."""
    waiting_a_desk: int = 8
    """Commands of one desk not begun: more than a person can have in mind."""
    waiting: int = 512
    """Commands of all desks not begun: twenty seconds of work at 40 ms each."""
    desks_awake: int = 256
    """Desks in memory, 5 to 20 MiB each after twenty clicks; others sleep in their journals."""
    desk_idle_seconds: float = 900.0
    """A desk that nothing was asked of sleeps: its journal wakes it within a second or two."""
    new_desks_a_minute: int = 120
    """Each writes a journal, so that a loop does not fill the disk."""
    uploads: int = 200
    """Uploaded pictures kept; the oldest go first."""
    uploads_bytes: int = 8 * 1024 * MIB
    """Of all uploaded pictures together, a small part of a disk."""
    tiles_bytes: int = 16 * 1024 * MIB
    """Tiles of huge pictures on the disk: four of 30,000 x 30,000."""
    journal_days: float = 30.0
    """Work that nobody came back to for so long is deleted at the next start."""
    scratch_seconds: float = 24 * 3600.0
    """Tiles of huge pictures are kept for so long, to be found again by the next start."""
    journal_bytes: int = 64 * MIB
    """Of one desk: half a million clicks."""
    pictures: int = 10_000
    """Of one folder that are listed; the list has about 60 bytes each."""
    open_pictures_bytes: int = 2048 * MIB
    """Decoded pictures kept open: forty of 4096 x 4096."""
    embeddings_bytes: int = 1024 * MIB
    """Embeddings kept: 256 of side 1024 at 4 MiB, sixteen of side 4096."""
    regions_bytes: int = 1024 * MIB
    """Embeddings of regions that desks looked at closely: 16 of each desk, 64 MiB at side 1024, so of sixteen desks."""
    decode_bytes: int = 6144 * MIB
    """Memory of the process that decodes an upload: 8 bytes a pixel for 400 megapixels, and the libraries."""
    decode_seconds: float = 120.0
    """To decode one; 30,000 x 30,000 pixels take ten to twenty seconds."""
    first_frame_seconds: float = 1.5
    """A page that opens a picture may show it before its encode takes the cores; one that nobody looks at shows nothing."""
    mask_side: int = 4096
    """Longest side of a mask sent whole, in samples; beyond it every second, fourth, … pixel."""
    mask_bytes: int = 44_000
    """Of a mask sent whole, so that with a header of 200 clicks the answer has 50 kB; beyond it as with ``mask_side``.  The
    raggedest of the starter model on a picture of 4096 x 4096 has 29 kB, half of them have less than 2.5."""


LIMITS = Limits()
