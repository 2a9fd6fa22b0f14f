"""HTTP/1.1 on asyncio: bytes in, requests out, responses written once per event-loop tick."""
