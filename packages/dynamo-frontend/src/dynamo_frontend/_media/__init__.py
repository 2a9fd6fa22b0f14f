"""Images, audio and video of a conversation: read from the request, fetched under the URL policy, hashed."""
