"""Transport without a network: clients take turns on one resident model, and every message is really made."""

import time
from collections.abc import Iterable, Iterator

from fedexperts.federation.runtime import ClientRuntime
from fedexperts.federation.transport import Delivery
from fedexperts.messages import Download, decode_download, decode_upload, encode_download, encode_upload


class InProcess:
    """Each message is serialised and read back, so its bytes are counted and nothing else can pass."""

    def __init__(self, runtime: ClientRuntime) -> None:
        """``runtime`` has the data of every client."""
        self._runtime = runtime

    @property
    def client_ids(self) -> tuple[str, ...]:
        """All clients of the data."""
        return self._runtime.data.client_ids

    def exchange(self, downloads: Iterable[tuple[str, Download]]) -> Iterator[Delivery]:
        """One client after the other, in the order given."""
        for client_id, download in downloads:
            started = time.perf_counter()
            message = encode_download(download)
            received = decode_download(message)
            downloaded = time.perf_counter()
            upload = self._runtime.handle(client_id, received)
            answered = time.perf_counter()
            answer = encode_upload(upload)
            returned = decode_upload(answer)
            ended = time.perf_counter()
            yield Delivery(
                client_id=client_id,
                upload=returned,
                download_bytes=len(message),
                upload_bytes=len(answer),
                seconds={"transport": downloaded - started + ended - answered},
            )
