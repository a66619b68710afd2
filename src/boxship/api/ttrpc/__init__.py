"""ttRPC: framing, server and client, without asyncio."""
